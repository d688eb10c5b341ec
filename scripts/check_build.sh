#!/usr/bin/env bash
# Builds sdist, wheels and an editable install for every combination of DEX_CUDA and nvcc, and checks the contents.
# usage: scripts/check_build.sh [PYTHON]   PYTHON: has torch and numpy (default .venv/bin/python)
# Works in a temporary copy with spaces in its path: neither the tree nor PYTHON's environment is changed. About two
# minutes on two cores.
# Without nvcc, the parts that need it are skipped with a note.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
work="$(mktemp -d)/a path with spaces"
mkdir "$work"
trap 'rm -rf "${work%/*}"' EXIT
began=$SECONDS

# $cpu: seconds of processor time of this script's children until now; on a shared machine the clock says nothing.
measure_cpu() {
    times > "$work/times"
    cpu=$(awk 'NR == 2 { split($1, u, "[ms]"); split($2, s, "[ms]"); print int(60 * (u[1] + s[1]) + u[2] + s[2]) }' "$work/times")
}
say() { printf '%4d s  %s\n' $((SECONDS - began)) "$*"; }
fail() { echo "check_build: $*" >&2; exit 1; }
# The names in an archive, one per line; those of an sdist without their leading folder.
names() { "$python" - "$1" <<'PY'
import sys, tarfile, zipfile
path = sys.argv[1]
if path.endswith(".whl"):
    print(*zipfile.ZipFile(path).namelist(), sep="\n")
else:
    print(*(n.partition("/")[2] for n in tarfile.open(path).getnames()), sep="\n")
PY
}
has() { names "$1" | grep -E "$2" >/dev/null || fail "$(basename "$1") lacks $2"; }
lacks() { ! names "$1" | grep -E "$2" || fail "$(basename "$1") holds $2"; }
build() { "$work/env/bin/python" -m build "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "build $* failed"; }; }
# A PATH without compilers, their tools and git: links to everything else.
hide_tools() {
    mkdir -p "$work/bin"
    local IFS=: folder tool
    for folder in $PATH; do
        for tool in "$folder"/*; do
            case ${tool##*/} in
                nvcc | git | make | cmake | ninja | cc | c++ | gcc* | g++* | c89* | c99* | clang* | *-linux-gnu-g[c+]*) continue ;;
            esac
            [[ -x $tool && ! -e $work/bin/${tool##*/} ]] && ln -s "$tool" "$work/bin/"
        done
    done
    return 0
}

mkdir "$work/tree"
tar --exclude=./.venv --exclude=./.git --exclude=./runs --exclude=./build --exclude=./dist --exclude='*.egg-info' \
    --exclude='_C.*' --exclude=__pycache__ -cf - . | tar -C "$work/tree" -xf -
cd "$work/tree"
"$python" -m venv "$work/env"
"$work/env/bin/pip" install -q build 'setuptools>=77'
hide_tools
nvcc=no
if command -v nvcc >/dev/null; then nvcc=yes; fi
unset DEX_CUDA CUDACXX CUDA_HOME
say "ready; nvcc: $nvcc"

# The sdist, made without nvcc, must hold the CUDA sources too.
PATH=$work/bin build --sdist --outdir "$work/sdist"
sdist=$(echo "$work"/sdist/*.tar.gz)
for name in CMakeLists.txt setup.py pyproject.toml csrc/common/math.h csrc/group_ema/group_ema.cu csrc/group_ema/bind.cpp csrc/bindings.cpp csrc/strict_nvcc.py \
    dexkernels/native.py dexkernels/ops/route/triton.py python/dex/cli/__init__.py LICENSE; do has "$sdist" "^$name\$"; done
lacks "$sdist" '\.(so|pyc)$'
say "sdist holds csrc and CMakeLists.txt"
mkdir "$work/from-sdist"
tar -C "$work/from-sdist" --strip-components=1 -xf "$sdist"
cd "$work/from-sdist"

# Without nvcc: one line and a pure wheel. With DEX_CUDA=1: a failure with that reason.
line='dexkernels: the native library is not built: no nvcc in $CUDACXX, $CUDA_HOME/bin or on PATH; everything else works without it'
PATH=$work/bin build --wheel --outdir "$work/none"
[[ $(grep -cxF "$line" "$work/log") == 1 ]] || fail "expected once: $line"
has "$work"/none/*-py3-none-any.whl '^dexkernels/native\.py$'
lacks "$work"/none/*.whl '\.so$'
! PATH=$work/bin DEX_CUDA=1 "$work/env/bin/python" -m build --wheel --outdir "$work/no" >"$work/log" 2>&1 ||
    fail "DEX_CUDA=1 without nvcc: expected a failure"
grep -q 'DEX_CUDA=1, but the native library cannot be built: no nvcc' "$work/log" || fail "no reason: $(cat "$work/log")"
say "without compilers, nvcc and git: a pure wheel and one line; DEX_CUDA=1 fails with the reason"

# A user without rights, offline, whose home cannot be written: build without isolation, install, pretrain two steps.
user=()
if [[ $(id -u) == 0 ]]; then  # May read what root may, such as PYTHON, but write nothing of root's
    user=(setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search)
fi
mkdir "$work/home" "$work/user"
cp -r "$work/from-sdist" "$work/user/source"
[[ $(id -u) != 0 ]] || chown -R 65534:65534 "$work/user"
chmod 555 "$work/home"
chmod 755 "${work%/*}"
as_user() {
    "${user[@]}" env -i PATH="$work/bin" HOME="$work/home" TMPDIR="$work/user" OMP_NUM_THREADS=1 "$@" >"$work/log" 2>&1 ||
        { cat "$work/log" >&2; fail "as a user: $* failed"; }
}
cd "$work/user"
as_user "$work/env/bin/python" -m pip install --no-index --no-build-isolation --no-deps --no-cache-dir --target site ./source
as_user PYTHONPATH="$work/user/site" "$python" -c 'import dex, sys; sys.exit(not dex.__file__.startswith(sys.argv[1]))' "$work/user/site"
as_user PYTHONPATH="$work/user/site" "$python" -m dex pretrain --preset demo --steps 2 --model.img-size 32 \
    --run.evaluate-images 2 --out "a run"
[[ -e $work/user/a\ run/config.yaml && -z $(ls -A "$work/home") ]] || fail "no run, or something in a home that is read-only"
cd "$work/from-sdist"
say "as a user without rights, offline, with a read-only home: built, installed and pretrained"

if [[ $nvcc == yes ]]; then
    DEX_CUDA=0 build --wheel --outdir "$work/zero"
    grep -qxF 'dexkernels: the native library is not built (DEX_CUDA=0)' "$work/log" || fail "DEX_CUDA=0 gives no message"
    has "$work"/zero/*-py3-none-any.whl '^dexkernels/'
    say "DEX_CUDA=0: a pure wheel"

    measure_cpu
    start=$cpu
    DEX_CUDA=1 build --wheel --outdir "$work/one"
    measure_cpu
    took=$((cpu - start))
    ((took < 240)) || fail "the wheel took $took s of processor time, expected less than 240, two minutes of two cores"
    wheel=$(echo "$work"/one/*.whl)
    for name in 'dexkernels/_C\.[^/]*\.so' dexkernels/native.py dexkernels/ops/route/triton.py dexkernels/py.typed dex/cli/__init__.py \
        dex/data/__init__.py dex/data/embedded/shard-00000.tar; do
        has "$wheel" "^$name\$"
    done
    lacks "$wheel" '^(csrc|tests|CMakeLists)'
    tag=$("$work/env/bin/python" -c 'import sys, sysconfig as s; v = "cp%d%d" % sys.version_info[:2]
print(v, v, s.get_platform().replace("-", "_"), sep="-")')
    [[ $wheel == *-$tag.whl ]] || fail "a wheel with _C: expected the tag $tag, got $(basename "$wheel")"
    description=$("$python" -c 'import sys, zipfile; z = zipfile.ZipFile(sys.argv[1])
print(*(z.read(n).decode() for n in z.namelist() if n.endswith(".dist-info/WHEEL")))' "$wheel")
    grep -qx 'Root-Is-Purelib: false' <<<"$description" || fail "a wheel with _C is called pure: $description"
    say "DEX_CUDA=1: wheel from the sdist with _C and both packages, in $took s"

    # This environment has no torch: the module must load without it.
    "$work/env/bin/pip" install -q --no-deps "$wheel"
    "$work/env/bin/python" - <<'PY'
import glob, importlib.util, sysconfig
(path,) = glob.glob(sysconfig.get_path("platlib") + "/dexkernels/_C.*")
spec = importlib.util.spec_from_file_location("dexkernels._C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
PY
    "$python" -m pip install -q --no-deps --target "$work/target" "$wheel"
    (cd "$work" && PYTHONPATH=$work/target "$python" - "$work/target" <<'PY'
import sys
from dexkernels import native
assert native.__file__.startswith(sys.argv[1]), native.__file__
assert native._loaded[1] is None, native._loaded[1]
PY
    )
    say "the wheel's library loads with torch and without"

    "$work/env/bin/pip" uninstall -q -y dexkernels
    cd "$work/tree"
    "$work/env/bin/pip" install -q --no-deps -e .
    [[ -e $(echo dexkernels/_C.*.so) ]] || fail "the editable install put no _C into dexkernels/"
    (cd "$work" && "$work/env/bin/python" -c 'import importlib.util as u; print(u.find_spec("dexkernels").origin)') |
        grep -qF "$work/tree/dexkernels" || fail "the editable install does not point to its tree"
    say "editable install: _C is in dexkernels/"
else
    say "no nvcc: wheel with _C and editable install with _C are not checked"
fi
say "all checks passed"

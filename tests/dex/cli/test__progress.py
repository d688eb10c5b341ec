import io

from dex.cli import _progress


def test_a_line_now_and_then_without_a_terminal(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    with _progress.shown("dex x") as say:
        for second in range(25):
            clock[0] = float(second)
            say(second, 25, f"part {second}")
    assert capsys.readouterr() == ("", "dex x 10/25  part 10\ndex x 20/25  part 20\n")


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(_progress.sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with _progress.shown("dex x") as say:
        say(3, 7, "swap")
    assert "3/7" in screen.getvalue() and "swap" in screen.getvalue()

"""The style sheet of reports and their charts, and the script that shows the values under the pointer."""

STYLE = """
:root{color-scheme:light dark;--page:#faf9f6;--panel:#fff;--ink:#1c2429;--quiet:#5a656c;--line:#dedbd3;--accent:#0d6e75;
--warn:#8a4b00;--warn-page:#fff3dc;--s0:#0d6e75;--s1:#cb5f12;--s2:#6a55b0;--s3:#b03a5b;--s4:#8a6d00;--s5:#2f72c4;
--s6:#3d7d3a;--s7:#5a656c;--resume:#2f72c4;--preempt:#6a55b0;--bad:#c21f2c;--spike:#cb5f12;--unused:#8a6d00}
@media (prefers-color-scheme:dark){@media screen{:root{--page:#12171a;--panel:#1a2125;--ink:#e9e7e2;--quiet:#a0abb1;
--line:#30393e;--accent:#63c5c2;--warn:#ffc673;--warn-page:#33270f;--s0:#63c5c2;--s1:#f2a05a;--s2:#b7a5f2;--s3:#ee8aa8;
--s4:#d9b640;--s5:#7fb6f5;--s6:#8fce88;--s7:#a0abb1;--resume:#7fb6f5;--preempt:#b7a5f2;--bad:#ff727b;--spike:#f2a05a;
--unused:#d9b640}}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;max-width:1200px;padding:clamp(16px,4vw,44px) clamp(16px,4vw,36px);background:var(--page);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
.over{margin:0 0 4px;color:var(--accent);font-weight:600;font-size:14px;letter-spacing:.08em;text-transform:uppercase}
h1{font-size:clamp(28px,5vw,42px);line-height:1.15;letter-spacing:-.02em;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:23px;line-height:1.25;letter-spacing:-.01em;margin:0 0 8px}
section{margin-top:44px;padding-top:22px;border-top:1px solid var(--line)}
h3{font-size:16px;margin:24px 0 6px}h4{font-size:15px;margin:18px 0 4px}
p{margin:6px 0}small,.soft{color:var(--quiet)}small{font-size:12px;font-weight:400}.soft{font-size:14px;max-width:90ch}
.lead{max-width:88ch;margin:8px 0 16px}ul.lead{padding-left:0;list-style:none}ul.lead li{margin:4px 0}
.tiles{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:10px;margin:20px 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:11px 15px;min-width:0;
display:flex;flex-direction:column;break-inside:avoid}
.tile b{font-size:25px;font-weight:600;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.tile span{font-size:14px}
.notice{border-left:4px solid var(--warn);background:var(--warn-page);padding:9px 14px;margin:8px 0;
overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 19px;margin-top:22px;font-size:15px}
a{color:var(--accent);text-underline-offset:.2em}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;margin:8px 0}
th,td{text-align:left;vertical-align:top;padding:5px 16px 5px 0;border-bottom:1px solid var(--line)}
thead th{font-weight:600;white-space:nowrap}tbody th{font-weight:400;color:var(--quiet);white-space:nowrap}
td{overflow-wrap:break-word}
.numbers td,.numbers th{text-align:right}.numbers tbody th,.numbers th:first-child{text-align:left}
.numbers td{white-space:nowrap}
.events td:last-child{min-width:150px}.starts td:last-child{min-width:220px}.machine td{min-width:130px}
.events td:not(:last-child),.starts td:not(:last-child){white-space:nowrap}
.events td:last-child,.machine td,code{overflow-wrap:anywhere}
code{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace}
.chip{display:inline-flex;align-items:center;gap:5px;font-weight:600;overflow-wrap:anywhere}
.groups{columns:4 230px;column-gap:32px}
.kv{width:100%;margin:0 0 14px;break-inside:avoid}.kv caption{text-align:left;font-weight:600;padding-top:8px}
.kv td{text-align:right;padding-right:0;overflow-wrap:anywhere}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr));gap:0 24px}
.picture{margin:14px 0;min-width:0}
.picture img{display:block;width:100%;min-width:620px;max-width:1128px;height:auto;border-radius:5px}
figcaption{font-size:14px;overflow-wrap:anywhere}
@media (min-width:761px){.pictures .picture img{min-width:0}}
@media (max-width:760px){tbody th{white-space:normal}.tiles{grid-template-columns:1fr 1fr}.tile{padding:9px 11px}
.tile b{font-size:20px}}
@media print{:root{--page:#fff}body{max-width:none;padding:0;font-size:12px}nav{display:none}
h2,h3,h4,p.key{break-after:avoid}.scroll{overflow:visible}.tiles{grid-template-columns:repeat(4,1fr)}
.picture img{min-width:0;width:auto;max-width:100%;max-height:225mm}section{margin-top:20px}
.picture,tr{break-inside:avoid}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:22px 24px;margin:14px 0;
align-items:end}
.chart{margin:0;min-width:0;position:relative;break-inside:avoid}
.chart.wide{margin:14px 0}
.chart svg{display:block;width:100%;height:auto;overflow:visible}
.chart svg text{font:10.5px/1 system-ui,sans-serif;fill:var(--quiet);font-variant-numeric:tabular-nums}
.chart figcaption{margin:0 0 4px}
.chart figcaption b{font-weight:600}
.narrow{display:none}
.key{display:flex;flex-wrap:wrap;gap:1px 12px;font-size:12px;color:var(--quiet);margin:0}
.key span{display:inline-flex;align-items:center;gap:4px;overflow-wrap:anywhere;min-width:0}
.chart svg.sample,svg.sample{width:16px;height:8px;flex:none;display:inline-block}
svg.glyph{width:12px;height:12px;flex:none}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.axis{stroke:var(--quiet);stroke-width:1;fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.faint{stroke-width:1.3;stroke-opacity:.6}
.dots{stroke-width:5.5}.faint.dots{stroke-width:4}
.band{stroke:none;fill-opacity:.28;fill:var(--quiet)}
.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}.f3{fill:var(--s3)}
.f4{fill:var(--s4)}.f5{fill:var(--s5)}.f6{fill:var(--s6)}.f7{fill:var(--s7)}
.dashed{stroke-dasharray:5 3}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}
.s4{stroke:var(--s4)}.s5{stroke:var(--s5)}.s6{stroke:var(--s6)}.s7{stroke:var(--s7)}
.m-resume{stroke:var(--resume);fill:var(--resume)}.m-preempt{stroke:var(--preempt);fill:var(--preempt)}
.m-bad{stroke:var(--bad);fill:none;stroke-width:1.8}.m-spike{stroke:var(--spike);fill:var(--spike)}
.m-unused{stroke:var(--unused);fill:var(--unused)}.m-other{stroke:var(--quiet);fill:none}
.rod{stroke-width:1;stroke-opacity:.55;stroke-dasharray:2 3;fill:none}
.cell{fill:var(--accent);stroke:var(--line);stroke-width:.5}
.pos{fill:var(--s1)}.neg{fill:var(--s5)}
.framed{stroke:var(--ink);stroke-width:1.5}
.chart.bars{max-width:600px}
.whisker{stroke:var(--ink);stroke-width:1;fill:none}
.chart svg text.in{font-size:9px;fill:var(--ink)}
.verdict{font-size:clamp(18px,2.4vw,22px);line-height:1.4;max-width:70ch;margin:10px 0 6px}
.verdict,.lead,.soft{overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:22px 28px;margin:14px 0;
align-items:start}
.read{font-size:14px;max-width:90ch;margin:10px 0;padding-left:14px;border-left:3px solid var(--line)}
.scan{margin:14px 0}.scan img,.thumbs img{display:block;max-width:100%;height:auto;border-radius:5px}
.thumbs{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:18px;margin:14px 0}
.thumbs figure{margin:0;min-width:0}.thumbs figcaption{margin-top:4px}
.files{font-size:13px;color:var(--quiet)}
.tip{position:absolute;z-index:2;pointer-events:none;max-width:min(260px,70%);padding:5px 8px;border-radius:5px;
background:var(--ink);color:var(--page);font-size:12px;line-height:1.35;white-space:pre-line;overflow-wrap:anywhere}
@media (max-width:760px){.narrow{display:block}.broad{display:none}.numbers tbody th{min-width:110px}}
@media print{.tip,.narrow{display:none}.broad{display:block}}
"""

SCRIPT = """
// Show the values under the pointer; the page is complete without this.
for (const svg of document.querySelectorAll('svg[data-x]')) {
  const [left, right, end] = svg.dataset.x.split(' ').map(Number), figure = svg.closest('figure');
  const lines = [...svg.querySelectorAll('path[data-p]')].filter(p => p.dataset.p).map(
    p => [p.dataset.l, p.dataset.p.split(' ').map(t => t.split(',').map(Number))]);
  if (!lines.length) continue;
  const tip = document.createElement('div');
  tip.className = 'tip'; tip.hidden = true; figure.append(tip);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), frame = figure.getBoundingClientRect();
    const step = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left) * end;
    const near = lines.map(([name, points]) => [name, points.reduce(
      (a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)]);
    const axis = svg.dataset.axis || 'step', text = ([name, p]) => `${name}: ${p[1]} at ${axis} ${Math.round(p[0])}`;
    tip.textContent = near.slice(0, 12).map(text).join('\\n');
    tip.hidden = false;
    const x = event.clientX - frame.left, half = x > frame.width / 2;
    tip.style.left = half ? 'auto' : `${x + 14}px`;
    tip.style.right = half ? `${frame.width - x + 14}px` : 'auto';
    tip.style.top = `${box.top - frame.top + 8}px`;
  });
  svg.addEventListener('pointerleave', () => { tip.hidden = true; });
}
"""

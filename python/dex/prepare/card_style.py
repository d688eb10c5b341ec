"""How the data card looks: on a screen wide or narrow, light or dark, and on paper."""

CSS = """
:root { color-scheme: light dark;
  --page: #faf9f6; --panel: #ffffff; --ink: #1c2429; --quiet: #5a656c; --line: #dedbd3; --accent: #0d6e75;
  --tint: 13, 110, 117; --warn: #8a4b00; --warn-page: #fff3dc;
  --train: #0d6e75; --val: #62b6b1; --foreground: #d8a13a; --blank: #a9adb0; --too-small: #8a72bd;
  --exact-duplicate: #b5482f; --near-duplicate: #e39a7f; --other: #4d5358; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12171a; --panel: #1a2125; --ink: #e9e7e2; --quiet: #a0abb1; --line: #30393e; --accent: #63c5c2;
  --tint: 99, 197, 194; --warn: #ffc673; --warn-page: #33270f;
  --train: #38a3a5; --val: #a5dcd6; --foreground: #dcab4c; --blank: #787f84; --too-small: #a48fd6;
  --exact-duplicate: #d8674c; --near-duplicate: #efb39d; --other: #c4c9cc; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 74rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3rem) clamp(1rem, 4vw, 2.5rem); }
h1 { font-size: clamp(1.9rem, 5vw, 2.8rem); line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.02em; }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2.small { font-size: 1rem; margin: 1.8rem 0 .5rem; letter-spacing: 0; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
section { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
small { display: block; font-size: .8125rem; line-height: 1.4; color: var(--quiet); font-weight: 400; }
.quiet, section > p { color: var(--quiet); }
.kicker { margin: 0 0 .3rem; color: var(--accent); font-weight: 600; font-size: .875rem; letter-spacing: .08em;
  text-transform: uppercase; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: 2rem; font-size: .9375rem; }
a { color: var(--accent); text-underline-offset: .2em; }
.mark { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: 0 .5rem;
  color: var(--quiet); font-size: .75rem; font-weight: 500; line-height: 1.35rem; white-space: nowrap;
  vertical-align: .05em; }
.mark + .mark { margin-left: .3rem; }
.simulated { border-color: currentColor; color: var(--warn); background: var(--warn-page); }
.notice { border-left: 4px solid var(--warn); background: var(--warn-page); padding: .6rem .9rem; margin-top: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 1px;
  background: var(--line); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; margin: 1.6rem 0 0; }
.tiles div { background: var(--panel); padding: .85rem 1rem; }
dt { color: var(--quiet); font-size: .875rem; }
dd { margin: 0; }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.25; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles span { color: var(--quiet); font-size: .8125rem; }
.bar { display: flex; gap: 1px; height: .75rem; border-radius: .2rem; overflow: hidden; min-width: 6rem; }
.bar i { flex: 0 1 0; min-width: 2px; }
header .bar { height: 1.4rem; border-radius: .3rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: .7rem 0 0; padding: 0;
  font-size: .875rem; }
.legend li { white-space: nowrap; }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin-right: .4rem;
  vertical-align: -.05em; }
.legend span { color: var(--quiet); }
.part-train { background: var(--train); } .part-val { background: var(--val); }
.part-foreground { background: var(--foreground); } .part-blank { background: var(--blank); }
.part-too-small { background: var(--too-small); } .part-exact-duplicate { background: var(--exact-duplicate); }
.part-near-duplicate { background: var(--near-duplicate); }
.part-withdrawn, .part-other { background: var(--other); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: 1rem;
  margin-top: 1.2rem; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; }
.panel h3 { margin: 0; } .panel p { margin: 0; color: var(--quiet); font-size: .8125rem; }
.panel .big { color: var(--ink); font-size: 1.5rem; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.big span { color: var(--quiet); font-size: .875rem; font-weight: 400; letter-spacing: 0; margin-left: .5rem; }
figure { margin: 0; }
.panel figure { margin: .4rem 0 .5rem; }
svg { display: block; width: 100%; height: 4.5rem; border-bottom: 1px solid var(--quiet); }
path { fill: var(--accent); fill-opacity: .8; }
.panel figcaption { display: flex; justify-content: space-between; color: var(--quiet); font-size: .75rem;
  padding-top: .15rem; }
.empty { margin-top: 1rem; border: 1px dashed var(--line); border-radius: .6rem; padding: .9rem 1rem; }
.empty h3 { margin: 0 0 .3rem; } .empty ul { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap;
  gap: .2rem 1.5rem; color: var(--quiet); } .empty b { color: var(--ink); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { text-align: left; vertical-align: top; padding: .6rem .75rem .6rem 0; border-bottom: 1px solid var(--line);
  font-weight: 400; }
thead th { color: var(--quiet); font-size: .8125rem; vertical-align: bottom; white-space: nowrap; }
.bar + small { margin-top: .3rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.name { font-weight: 600; }
.group th { padding-top: 1.3rem; color: var(--accent); font-weight: 600; border-bottom-color: var(--quiet); }
#sources td.wide { width: 40%; padding-top: .85rem; padding-left: 1rem; } #sources thead th:nth-child(3) {
  padding-left: 1rem; }
#sources th[scope=row] { width: 30%; } #licences th[scope=row] { width: 26%; } #licences td:nth-child(2) { width: 24%; }
#sources td.number:nth-child(2) small, #left-out th[scope=row] { white-space: nowrap; }
#left-out td.number { padding-right: 1.6rem; }
#text table { max-width: 46rem; } #text table + p { margin-top: .8rem; }
.grid { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .9rem; }
.grid img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; background: #000;
  border-radius: .3rem; }
.grid figcaption { font-size: .75rem; line-height: 1.35; padding-top: .3rem; color: var(--quiet); }
.grid .two { grid-column: span 2; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
.grid b { color: var(--ink); font-weight: 500; } .grid .mark { margin-right: .35rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.matrix { width: auto; } .matrix th, .matrix td { padding: .45rem .6rem; border: 1px solid var(--line);
  overflow-wrap: normal; }
.matrix thead th { text-align: center; } .matrix thead th:first-child { text-align: left; }
.matrix th[scope=row] { min-width: 9rem; max-width: 16rem; overflow-wrap: anywhere; }
.matrix td { text-align: right; min-width: 3.2rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.matrix .hit { background: rgba(var(--tint), calc(.06 + .34 * var(--share))); } .matrix small { color: inherit; }
.numbered { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.4rem;
  font-size: .875rem; }
.numbered b { color: var(--quiet); font-weight: 400; margin-right: .2rem; } .numbered .name { font-weight: 500; }
.rules { display: grid; grid-template-columns: minmax(8rem, 15rem) 1fr; gap: .55rem 1.5rem; margin: 0; }
.rules .rules { grid-template-columns: minmax(5rem, 11rem) 1fr; gap: .15rem 1rem; }
.rules dt { font-size: .9375rem; }
@media (max-width: 44.99rem) {
  .cards thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  .cards, .cards tbody, .cards tr, .cards th, .cards td { display: block; }
  #sources .cards th, #sources .cards td, #text .cards th, #text .cards td, #licences .cards th, #licences .cards td {
    width: auto; padding: .25rem 0; border: 0; text-align: left; }
  .cards th, .cards td { padding: .25rem 0; border: 0; text-align: left; }
  .cards tr { border-bottom: 1px solid var(--line); padding: .7rem 0; }
  .cards .group { border: 0; padding: 1.1rem 0 0; }
  .cards td { display: grid; grid-template-columns: 7.5rem 1fr; column-gap: .75rem; }
  .cards td::before { content: attr(data-label); color: var(--quiet); font-size: .8125rem; line-height: 1.5rem;
    grid-row: 1 / span 3; }
  .cards td > * { grid-column: 2; }
  .cards td .bar { align-self: center; margin: .35rem 0; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } .tiles b { font-size: 1.4rem; }
  .tiles div { padding: .7rem .8rem; }
  .grid { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .6rem; } .grid .two { grid-column: span 3; }
  .rules, .rules .rules { grid-template-columns: 1fr; gap: .1rem; } .rules dd { margin-bottom: .6rem; }
  .rules .rules { padding-left: .8rem; border-left: 2px solid var(--line); } }
@media print {
  :root { --page: #fff; --panel: #fff; --ink: #000; --quiet: #444; --line: #bbb; --accent: #0d6e75; --warn: #8a4b00;
    --warn-page: #fff; --tint: 13, 110, 117; --train: #0d6e75; --val: #62b6b1; --other: #4d5358; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } nav { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { margin-top: 1.5rem; } .scroll { overflow: visible; }
  tr, figure, .panel, .empty { break-inside: avoid; } h2, h3, .group { break-after: avoid; } }
"""

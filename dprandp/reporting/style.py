"""The CSS of report.html: one column on a phone, light and dark, and on paper."""

CSS = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2127; --soft: #566069; --line: #d5dae0; --panel: #f4f6f8; --accent: #1f6fb5;
  --good: #14633a; --good-panel: #e3f4ea; --bad: #ffffff; --bad-panel: #b3161d; --hit: 47 127 196; --miss: 217 95 2; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --ink: #e6e9ec; --soft: #a5aeb8; --line: #3a424b; --panel: #1e2329; --accent: #6cb2f0;
  --good: #8fe0b0; --good-panel: #143524; --bad: #ffffff; --bad-panel: #a81820; --hit: 74 150 216;
  --miss: 226 118 38; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, caption, dt { color: var(--soft); }
.banner { margin: 1rem 0; padding: .9rem 1.1rem; border-radius: .5rem; background: var(--bad-panel);
  color: var(--bad); }
.banner strong { display: block; font-size: 1.7rem; line-height: 1.2; letter-spacing: .04em; }
.banner p { max-width: none; }
.badge { display: inline-block; padding: .15rem .7rem; border-radius: 1rem; font-weight: 700; letter-spacing: .04em;
  background: var(--good-panel); color: var(--good); border: 1px solid var(--good); }
.note { margin: 1rem 0; padding: .7rem 1rem; border-left: .3rem solid #d95f02;
  background: var(--panel); }
.numbers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.numbers div { background: var(--panel); border-radius: .5rem; padding: .75rem .9rem; }
.numbers dt { font-size: .875rem; }
.numbers dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.numbers .big dd { font-size: 2.3rem; line-height: 1.15; font-weight: 700; white-space: nowrap; }
.numbers sup { line-height: 0; font-size: .6em; }
.numbers small { display: block; white-space: normal;
  font-size: .8125rem; font-weight: 400; color: var(--soft); line-height: 1.35; }
ol.stages { list-style: none; margin: 0; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(13.5rem, 1fr)); }
ol.stages li { background: var(--panel); border-top: .25rem solid var(--accent); border-radius: .25rem;
  padding: .7rem .9rem; }
ol.stages li.open { border-top-color: var(--line); }
ol.stages h3 { margin: 0; }
ol.stages h3 small { display: block; font-weight: 400; font-size: .9375rem; }
ol.stages p { margin: .25rem 0 0; font-size: .9375rem; }
figure { margin: .75rem 0; }
figcaption { font-size: .875rem; margin-top: .35rem; max-width: 46rem; }
img { max-width: 100%; height: auto; border-radius: .25rem; display: block; }
svg { width: 100%; height: auto; display: block; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem; }
.curves figure { margin: 0; max-width: 32rem; }
.picture { max-width: 36rem; }
.bar { display: flex; height: 1.75rem; border-radius: .3rem; overflow: hidden; background: var(--panel);
  border: 1px solid var(--line); }
.bar span { display: block; min-width: 2px; }
.probe { background: var(--accent); }
.finetune { background: #d95f02; }
.continue { background: #7570b3; }
.other { background: var(--soft); }
ul.legend { list-style: none; padding: 0; margin: .5rem 0; }
ul.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .5rem;
  border: 1px solid var(--line); }
.scroll { overflow-x: auto; margin: .75rem 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .875rem; padding-bottom: .4rem; }
caption span { display: block; max-width: min(46rem, calc(100vw - 2.5rem)); }
.whole { white-space: nowrap; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); }
.facts { width: 100%; }
.facts tbody th { width: 11.5rem; font-weight: 600; }
.confusion td { text-align: right; min-width: 2.6rem; border: 1px solid var(--paper); }
.confusion thead th { text-align: right; vertical-align: bottom; font-weight: 500; max-width: 8rem; }
.confusion tbody th { font-weight: 500; max-width: 14rem; position: sticky; left: 0; background: var(--paper); }
.confusion tbody th { border-bottom: 0; }
.confusion thead th:first-child { text-align: left; min-width: 5rem; }
.hit { background: rgb(var(--hit) / var(--share)); }
.miss { background: rgb(var(--miss) / var(--share)); }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
pre { overflow-x: auto; background: var(--panel); border-radius: .4rem; padding: .75rem 1rem; font-size: .875rem; }
code { overflow-wrap: anywhere; }
footer { margin-top: 3rem; font-size: .875rem; color: var(--soft); }
@media (max-width: 34rem) {
  body { padding: 1rem .9rem 3rem; }
  .facts, .facts tbody, .facts tr, .facts th, .facts td, .facts caption { display: block; width: auto; }
  .facts thead { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; }
  .facts tbody th { width: auto; border: 0; padding: .6rem 0 0; }
  .facts td { padding: .1rem 0 .6rem; }
  .facts td[data-column]::before { content: attr(data-column) ": "; color: var(--soft); }
  .facts td[data-column]:not(:last-child) { border-bottom: 0; padding-bottom: .2rem; }
  .numbers { gap: .5rem; }
  .numbers div { padding: .5rem .55rem; }
  .numbers dd { font-size: 1.1rem; }
  .numbers .big dd { font-size: 1.45rem; }
  .numbers small, .numbers dt { font-size: .75rem; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f4f4f4;
  --accent: #1f6fb5;
    --good: #14633a; --good-panel: #e3f4ea; --hit: 47 127 196; --miss: 217 95 2; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  html { font-size: 9.5pt; }
  body { max-width: none; padding: 0; }
  ol.stages { grid-template-columns: repeat(4, 1fr); }
  details::details-content { content-visibility: visible; height: auto; }
  .confusion tbody th { position: static; }
  .scroll, pre { overflow: visible; white-space: pre-wrap; }
  table { white-space: normal; }
  figure, li, tr, .banner, .numbers { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

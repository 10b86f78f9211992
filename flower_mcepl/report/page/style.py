"""Style sheet of the page: in light, in the dark, on a telephone, on paper."""

CSS = """\
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #57606a; --paper: #fff; --line: #d0d7de;
  --shade: #f6f8fa; --edge: rgb(0 0 0 / 28%); }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9aa4af; --paper: #14181d; --line: #3a424c; --shade: #1d232a;
    --edge: rgb(255 255 255 / 30%); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
.lead, figcaption, .notes { color: var(--faint); }
figcaption, .notes { font-size: .9rem; }
.notes { padding-left: 1.2rem; }
/* What is wider than its box scrolls in it; a shadow lies on each edge that hides something. */
.scroll, pre { --ground: var(--paper); overflow-x: auto; background:
  linear-gradient(to right, var(--ground) 50%, transparent) left / 2.4rem 100% no-repeat local,
  linear-gradient(to left, var(--ground) 50%, transparent) right / 2.4rem 100% no-repeat local,
  linear-gradient(to right, var(--edge), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--edge), transparent) right / .8rem 100% no-repeat scroll,
  var(--ground); }
/* A table between paragraphs may be wider than they are, up to the window. */
main > .scroll { width: max-content; min-width: 100%; max-width: calc(100vw - 2rem);
  margin-left: 50%; transform: translateX(-50%); }
table { border-collapse: separate; border-spacing: 0; font-size: .92rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); line-height: 1.375rem;
  text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--faint); }
.short { white-space: nowrap; }
.long { min-width: 8rem; overflow-wrap: anywhere; }
.number { text-align: right; }
th.number { white-space: normal; }
main > .scroll th:first-child, main > .scroll td:first-child { position: sticky; left: 0;
  background: var(--paper); }
figure { margin: 1.2rem 0 2rem; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; padding: .4rem; margin-bottom: .4rem;
  background: #fff; border: 1px solid var(--line); border-radius: 6px; }
details { margin: .5rem 0; padding: .4rem .8rem; border: 1px solid var(--line);
  border-radius: 6px; }
summary { cursor: pointer; font-weight: 600; }
pre { --ground: var(--shade); padding: .7rem; font-size: .82rem; line-height: 1.4;
  overflow-wrap: normal; }
dt { font-weight: 600; margin-top: .5rem; }
dd { margin: 0 0 0 1.2rem; }
@media print {
  :root { --ink: #000; --faint: #333; --paper: #fff; --line: #bbb; --shade: #f4f4f4; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll, pre { overflow: visible; background: none; }
  main > .scroll { width: auto; max-width: none; margin-left: 0; transform: none; }
  pre { white-space: pre-wrap; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; line-height: 1.4; }
  h2, h3, summary { break-after: avoid; }
  tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

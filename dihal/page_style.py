"""Style and script of the HTML pages."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root{--bg:#fff;--fg:#1c1f24;--muted:#667080;--rule:#d9dee6;--soft:#f4f6f9;--grey:#7b8494;
--c0:#0068b0;--c1:#c64f00;--c2:#00835f;--c3:#a8478a;--c4:#9a6b00;--c5:#2b87b8}
@media(prefers-color-scheme:dark){:root{--bg:#14171c;--fg:#e6e9ee;--muted:#9aa4b2;--rule:#323945;--soft:#1d2229;
--grey:#8f99a8;--c0:#5db3f5;--c1:#ff9555;--c2:#45cfa4;--c3:#e69ccb;--c4:#e8b94a;--c5:#8fd0f0}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1360px;margin:0 auto;padding:1.2rem 1rem 3rem}
h1{font-size:1.6rem;margin:.2rem 0 .6rem}h2{font-size:1.15rem;margin:2rem 0 .6rem}h3{font-size:1rem;margin:0 0 .4rem}
ul{margin:0 0 1rem;padding-left:1.1rem;color:var(--muted);font-size:.9rem}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .45rem;text-align:left;white-space:nowrap;border-top:1px solid var(--rule)}
thead th{border-top:0;background:var(--soft);padding:0}
thead button{all:unset;box-sizing:border-box;width:100%;padding:.45rem .45rem;cursor:pointer;font-weight:600;white-space:nowrap}
thead button:hover{text-decoration:underline}
:focus-visible,thead button:focus-visible{outline:2px solid var(--c0);outline-offset:-2px}
thead span::after{content:"";display:inline-block;width:1em;text-align:center}
[aria-sort=ascending] span::after{content:"\\2191"}[aria-sort=descending] span::after{content:"\\2193"}
td.number,th.number,th.number button{text-align:right}
tbody th{font-weight:400;position:sticky;left:0;background:var(--bg)}tbody tr.checkpoint th{font-weight:700}tbody tr:not(.checkpoint){color:var(--muted)}
tbody tr:hover,tbody tr:hover th{background:var(--soft)}
.kind{font-size:.78rem;border:1px solid var(--rule);border-radius:9px;padding:0 .5em;color:var(--muted)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1.2rem;margin:1.4rem 0}
figure{margin:0;border:1px solid var(--rule);border-radius:6px;padding:.8rem;min-width:0}
figcaption{color:var(--muted);font-size:.82rem;margin-top:.3rem}
svg{width:100%;height:auto;display:block;font-size:12px;font-family:inherit}
svg text{fill:var(--fg)}svg .tick,svg .axis,svg .muted{fill:var(--muted)}svg .value{font-variant-numeric:tabular-nums}
svg .name:not(.muted){font-weight:600}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .whisker{stroke-width:2;stroke-linecap:round;opacity:.55}svg .leader{stroke-width:.8;opacity:.6}
svg .path{fill:none;stroke-width:1.8}
svg .dot{stroke-width:1.8}svg .hollow{fill:var(--bg)!important}svg .faint{opacity:.45}
svg .grey{stroke:var(--grey);fill:var(--grey)}
svg .c0{stroke:var(--c0);fill:var(--c0)}svg .c1{stroke:var(--c1);fill:var(--c1)}svg .c2{stroke:var(--c2);fill:var(--c2)}
svg .c3{stroke:var(--c3);fill:var(--c3)}svg .c4{stroke:var(--c4);fill:var(--c4)}svg .c5{stroke:var(--c5);fill:var(--c5)}
svg .path{fill:none}
details{border-bottom:1px solid var(--rule);padding:.35rem 0}summary{cursor:pointer}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;margin:.5rem 0;font-size:.85rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
blockquote{margin:.5rem 0;padding:.4rem .7rem;background:var(--soft);border-left:3px solid var(--rule);font-size:.88rem;white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{color:var(--muted)}
@media(max-width:520px){dl{grid-template-columns:1fr}dd{margin-bottom:.3rem}main{padding:.8rem .7rem 2rem}
tbody th{max-width:9.5rem;overflow:hidden;text-overflow:ellipsis}figure{padding:.6rem .4rem}}
"""

# Sorting only: the table is complete and in order without it. Cells without a value stay last in both directions.
SCRIPT = """
for(const table of document.querySelectorAll("table")){
const heads=[...table.tHead.rows[0].cells];
heads.forEach((head,column)=>head.querySelector("button").addEventListener("click",()=>{
const up=head.getAttribute("aria-sort")!=="ascending";
heads.forEach(other=>other.removeAttribute("aria-sort"));
head.setAttribute("aria-sort",up?"ascending":"descending");
const body=table.tBodies[0],value=row=>row.cells[column].dataset.v;
[...body.rows].sort((a,b)=>{
const x=value(a),y=value(b);
if(x===undefined||y===undefined)return(x===undefined)-(y===undefined);
const p=Number(x),q=Number(y),order=Number.isNaN(p)||Number.isNaN(q)?x.localeCompare(y):p-q;
return up?order:-order;
}).forEach(row=>body.append(row));
}));
}
"""

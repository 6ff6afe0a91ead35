"use strict";
const valueOf = (cell) => cell.dataset.value ?? cell.textContent.trim();
const compare = (a, b) => {
  if (a === "" || b === "") return (a === "") - (b === "");
  return a - b || String(a).localeCompare(String(b), undefined, { numeric: true });
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const numeric = head.classList.contains("number");
    const before = head.getAttribute("aria-sort");
    const turn = before ? before === "ascending" : numeric && column > 0;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", turn ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
    rows.sort(([a], [b]) => (turn && a !== "" && b !== "" ? -1 : 1) * compare(a, b));
    body.append(...rows.map(([, row]) => row));
  }));
}
const filter = document.getElementById("filter");
if (filter) {
  const rows = [...document.getElementById("layer-rows").rows];
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = (row.cells[1].textContent + " " + row.cells[2].textContent).toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    document.getElementById("shown").textContent = words.length ? `${count} of ${rows.length}` : "";
  });
}
const canvas = document.getElementById("canvas");
if (canvas) {
  const picture = canvas.querySelector("svg");
  const box = picture.viewBox.baseVal;
  const fitting = () => Math.min(1, (canvas.parentElement.clientWidth - 2) / box.width);
  let scale = 1;
  const zoom = (next, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) => {
    next = Math.min(4, Math.max(0.1, next));
    const left = (canvas.scrollLeft + x) / scale, top = (canvas.scrollTop + y) / scale;
    scale = next;
    picture.setAttribute("width", box.width * scale);
    picture.setAttribute("height", box.height * scale);
    canvas.scrollLeft = left * scale - x;
    canvas.scrollTop = top * scale - y;
  };
  const act = { in: () => zoom(scale * 1.25), out: () => zoom(scale / 1.25), fit: () => zoom(fitting()) };
  document.querySelectorAll("[data-zoom]").forEach((button) =>
    button.addEventListener("click", act[button.dataset.zoom]));
  canvas.addEventListener("keydown", (event) => {
    const key = { "+": "in", "=": "in", "-": "out", 0: "fit" }[event.key];
    if (!key || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act[key]();
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const frame = canvas.getBoundingClientRect();
    zoom(scale * Math.exp(-event.deltaY / 300), event.clientX - frame.left, event.clientY - frame.top);
  }, { passive: false });
  let held = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    held = { x: event.clientX + canvas.scrollLeft, y: event.clientY + canvas.scrollTop };
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("held");
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!held) return;
    canvas.scrollLeft = held.x - event.clientX;
    canvas.scrollTop = held.y - event.clientY;
  });
  const release = () => { held = null; canvas.classList.remove("held"); };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  let spread = 0;
  const gap = ([a, b]) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
  canvas.addEventListener("touchstart", (event) => {
    spread = event.touches.length === 2 ? gap(event.touches) / scale : 0;
  }, { passive: true });
  canvas.addEventListener("touchmove", (event) => {
    if (!spread || event.touches.length !== 2) return;
    event.preventDefault();
    const frame = canvas.getBoundingClientRect();
    const [a, b] = event.touches;
    zoom(gap(event.touches) / spread, (a.clientX + b.clientX) / 2 - frame.left, (a.clientY + b.clientY) / 2 - frame.top);
  }, { passive: false });
}

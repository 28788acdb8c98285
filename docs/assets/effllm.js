// Filters of the papers page, the graph explorer, and the plots. Every part does nothing where its element is absent.
"use strict";

function papersPage(form, list) {
  const items = [...list.children];
  const update = () => {
    const wanted = new FormData(form);
    const words = wanted.get("text").toLowerCase().split(/\s+/).filter(Boolean);
    const category = wanted.get("category");
    let shown = 0;
    for (const item of items) {
      const d = item.dataset;
      const inside = !category || d.categories.split(" ").some((c) => (c + "/").startsWith(category + "/"));
      const keep = inside && words.every((w) => d.text.includes(w)) && (!wanted.get("runs") || d.runs) &&
        (!wanted.get("year") || d.year === wanted.get("year")) && (!wanted.get("venue") || d.venue === wanted.get("venue"));
      item.hidden = !keep;
      shown += keep;
    }
    form.querySelector("output").textContent = `${shown} of ${items.length}`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}

function explorer(form, svg) {
  const nodes = [...svg.querySelectorAll(".node")];
  const edges = [...svg.querySelectorAll(".edge")];
  const update = () => {
    const wanted = new FormData(form);
    const text = wanted.get("text").trim().toLowerCase();
    const kinds = new Set(wanted.getAll("relation"));
    const kept = new Set();
    let shown = 0;
    for (const node of nodes) {
      const d = node.dataset;
      if (d.kind && d.kind !== "method") continue;
      const hit = !text || d.id.includes(text) || d.name.toLowerCase().includes(text);
      const inside = !wanted.get("category") || ((d.category || "") + "/").startsWith(wanted.get("category") + "/");
      const keep = hit && inside && (!wanted.get("covered") || node.classList.contains("covered"));
      node.classList.toggle("dim", !keep);
      node.classList.toggle("hit", Boolean(text) && keep);
      if (keep) { kept.add(d.id); shown += 1; }
    }
    for (const edge of edges) {
      const d = edge.dataset;
      edge.classList.toggle("gone", d.relation !== "in" && !kinds.has(d.relation));
      edge.classList.toggle("dim", d.relation !== "in" && !(kept.has(d.from) && kept.has(d.to)));
    }
    form.querySelector("output").textContent = `${shown} methods`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => { setTimeout(update); view = { ...whole }; show(); });

  const [x0, y0, width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const whole = { x: x0, y: y0, width, height };
  let view = { ...whole };
  const show = () => svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
  const point = (x, y) => new DOMPoint(x, y).matrixTransform(svg.getScreenCTM().inverse());
  const zoom = (factor, x, y) => {
    factor = Math.min(Math.max(factor, view.width / (whole.width * 2)), view.width / (whole.width / 40));
    const at = point(x, y);
    view = { x: at.x - (at.x - view.x) / factor, y: at.y - (at.y - view.y) / factor,
      width: view.width / factor, height: view.height / factor };
    show();
  };
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * 0.0015), event.clientX, event.clientY);
  }, { passive: false });

  const fingers = new Map();
  let moved = 0;
  svg.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, event); moved = 0; });
  svg.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    moved += Math.abs(event.clientX - last.clientX) + Math.abs(event.clientY - last.clientY);
    if (fingers.size === 1 && moved > 4) {
      svg.classList.add("dragging");
      svg.setPointerCapture(event.pointerId);
      const from = point(last.clientX, last.clientY), to = point(event.clientX, event.clientY);
      view.x += from.x - to.x;
      view.y += from.y - to.y;
      show();
    } else if (fingers.size === 2) {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const spread = (e) => Math.hypot(e.clientX - other.clientX, e.clientY - other.clientY);
      zoom(spread(event) / Math.max(spread(last), 1), other.clientX, other.clientY);
    }
    fingers.set(event.pointerId, event);
  });
  for (const kind of ["pointerup", "pointercancel", "pointerleave"]) {
    svg.addEventListener(kind, (event) => { fingers.delete(event.pointerId); svg.classList.remove("dragging"); });
  }
  svg.addEventListener("click", (event) => { if (moved > 4) event.preventDefault(); }, true);
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  update();
}

function plots(figures) {
  const style = getComputedStyle(document.body);
  const ink = style.getPropertyValue("--md-default-fg-color") || "#222";
  for (const element of figures) {
    const figure = JSON.parse(element.dataset.figure);
    const axis = (title) => ({ title: { text: title }, gridcolor: "rgba(128,128,128,0.25)", automargin: true });
    const layout = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink }, margin: { t: 20 },
      xaxis: axis(figure.x), yaxis: axis(figure.y), showlegend: true, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" } };
    if (figure.buttons.length) {
      layout.margin.t = 60;
      layout.updatemenus = [{ x: 0, xanchor: "left", y: 1.03, yanchor: "bottom", bgcolor: "#fff", font: { color: "#222" },
        buttons: figure.buttons.map(({ label, update }) => ({ label, method: "restyle", args: [update] })) }];
    }
    for (const name of figure.log) layout[`${name}axis`].type = "log";
    if (figure.data[0]?.type === "heatmap") layout.yaxis.autorange = "reversed"; // the first method at the top
    element.style.height = `${figure.height}px`;
    for (const { mode, marker } of figure.data) if (mode) marker.size = mode === "markers" ? 10 : 7;
    Plotly.newPlot(element, figure.data, layout, { responsive: true, displaylogo: false });
  }
}

document.addEventListener("DOMContentLoaded", () => {
  const filters = document.getElementById("paper-filters");
  if (filters) papersPage(filters, document.getElementById("paper-list"));
  const graph = document.getElementById("graph-filters");
  if (graph) explorer(graph, document.querySelector("#explorer svg"));
  const figures = document.querySelectorAll(".plot");
  if (figures.length) plots(figures);
});

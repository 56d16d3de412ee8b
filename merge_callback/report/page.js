"use strict";
// Reads the points of a chart out, by pointer, finger or arrow keys. Without it, the tables have them all.
for (const figure of document.querySelectorAll("figure.chart")) {
  const { names, colors, points } = JSON.parse(figure.querySelector("script").textContent);
  const area = figure.querySelector(".area");
  const tip = figure.querySelector(".tip");
  const cursor = figure.querySelector(".cursor");
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(points.length - 1, index));
    const [left, step, values] = points[at];
    tip.replaceChildren(document.createTextNode("step " + step));
    values.forEach((value, line) => {
      if (value === null) return;
      const row = document.createElement("div");
      const dot = document.createElement("i");
      dot.style.setProperty("--c", colors[line]);
      row.append(dot, names[line] + " " + value);
      tip.append(row);
    });
    cursor.style.left = left + "%";
    tip.style.left = left < 50 ? "calc(" + left + "% + 10px)" : "auto";
    tip.style.right = left < 50 ? "auto" : "calc(" + (100 - left) + "% + 10px)";
    figure.classList.add("on");
  }

  function hide() {
    at = -1;
    figure.classList.remove("on");
  }

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const left = (100 * (event.clientX - box.left)) / box.width;
    let nearest = 0;
    points.forEach((point, index) => {
      if (Math.abs(point[0] - left) < Math.abs(points[nearest][0] - left)) nearest = index;
    });
    show(nearest);
  });
  area.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: at + 1, ArrowLeft: at < 0 ? points.length - 1 : at - 1, Home: 0, End: points.length - 1 };
    if (event.target !== figure) return;
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    } else if (event.key === "Escape") hide();
  });
}

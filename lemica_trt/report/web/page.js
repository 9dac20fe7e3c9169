"use strict";
// One clock draws all clips; a wipe shows two of them in one place.
(() => {
  const holder = document.getElementById("clip-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const byId = (name) => document.getElementById(name);
  const panes = [...document.querySelectorAll(".clips figure")];
  const wipe = byId("wipe"), edge = byId("edge"), against = byId("against"), slider = byId("frame"), play = byId("play");
  const loaded = new Map();
  let clip = 0, kind = "frames", frame = 0, last = 0;
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

  const picture = (address) => {
    if (!address) return null;
    if (!loaded.has(address)) {
      const image = new Image();
      image.addEventListener("load", draw);
      image.src = address;
      loaded.set(address, image);
    }
    const image = loaded.get(address);
    return image.complete && image.naturalWidth ? image : null;
  };

  const paint = (canvas, address, from, to) => {
    const context = canvas.getContext("2d"), image = picture(address), w = data.width, h = data.height;
    if (!image) return;
    context.drawImage(image, from, frame * h, to - from, h, from, 0, to - from, h);
  };

  // What a run shows: nothing but its frames where there is no difference to itself.
  const shown = (run) => run[kind] || (kind === "frames" ? run.frames : null);

  function draw() {
    const runs = data.clips[clip].runs;
    panes.forEach((pane, at) => {
      const canvas = pane.querySelector("canvas");
      canvas.getContext("2d").clearRect(0, 0, data.width, data.height);
      if (runs[at]) paint(canvas, shown(runs[at]), 0, data.width);
    });
    const other = runs[Number(against.value)] || runs[0], x = Math.round(data.width * Number(edge.value) / 100);
    wipe.getContext("2d").clearRect(0, 0, data.width, data.height);
    if (x > 0) paint(wipe, runs[0].frames, 0, x);
    if (x < data.width) paint(wipe, other.frames, x, data.width);
    byId("wipe-line").style.left = `${100 * x / data.width}%`;
    slider.value = frame;
    byId("wipe-right").textContent = `right: ${other.name}, ${other.text}`;
  }

  function tell() {
    const now = data.clips[clip];
    byId("clip-prompt").textContent = `“${now.prompt}”, seed ${now.seed}`;
    panes.forEach((pane, at) => {
      const run = now.runs[at];
      pane.hidden = !run;
      if (!run) return;
      pane.querySelector("strong").textContent = run.name;
      pane.querySelector("span").textContent = run.text;
      pane.querySelector("canvas").setAttribute("aria-label", `${now.prompt}: ${run.name}, ${run.text}`);
    });
    draw();
  }

  function tick(time) {
    if (playing && time - last >= data.milliseconds) {
      frame = (frame + 1) % data.frames;
      last = time;
      draw();
    }
    requestAnimationFrame(tick);
  }

  const setPlaying = (value) => {
    playing = value;
    play.textContent = playing ? "Pause" : "Play";
  };

  document.querySelectorAll('input[name="clip"]').forEach((input) =>
    input.addEventListener("change", () => { clip = Number(input.value); tell(); }));
  document.querySelectorAll('input[name="kind"]').forEach((input) =>
    input.addEventListener("change", () => { kind = input.value; draw(); }));
  play.addEventListener("click", () => setPlaying(!playing));
  slider.addEventListener("input", () => { setPlaying(false); frame = Number(slider.value); draw(); });
  edge.addEventListener("input", draw);
  against.addEventListener("change", draw);
  const drag = (event) => {
    const box = wipe.getBoundingClientRect();
    edge.value = Math.round(100 * (event.clientX - box.left) / box.width);
    draw();
  };
  wipe.addEventListener("pointerdown", (event) => { wipe.setPointerCapture(event.pointerId); drag(event); });
  wipe.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  setPlaying(playing && data.frames > 1);
  tell();
  requestAnimationFrame(tick);
})();

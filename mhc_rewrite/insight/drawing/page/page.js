"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const tip = $("#tip"), search = $("#q"), found = $("#found"), unfoldAll = $("#all");
  const text = (element, value) => { element.textContent = value; return element; };

  // -- layers ---------------------------------------------------------------------------------------------------
  const panel = ([number, width, height], side) => `<svg class="mhc ${side}" width="${width}" height="${height}" ` +
    `viewBox="0 0 ${width} ${height}" aria-hidden="true"><use href="#d${number}"/></svg>`;
  const row = ([before, after, fact, name, label]) => {
    const made = document.createElement("div");
    made.className = "row";
    made.tabIndex = 0;
    made.setAttribute("role", "img");
    made.setAttribute("aria-label", `${name}: ${label}`);
    made.dataset.f = fact;
    made.dataset.n = name;
    made.innerHTML = panel(before, "b") + panel(after, "a");
    return made;
  };
  const build = card => {
    const layers = document.createElement("div");
    layers.className = "layers";
    for (const [name, rows, height] of data.groups[card.dataset.g]) {
      const layer = document.createElement("div");
      layer.className = "layer";
      layer.style.containIntrinsicSize = `auto ${height}px`;
      const head = document.createElement("h3");
      head.className = "lname mono";
      layer.append(text(head, name), ...rows.map(row));
      layers.append(layer);
    }
    card.append(layers);
  };
  const toggle = (card, open) => {
    if (open && !$(".layers", card)) build(card);
    if (!open) $(".layers", card)?.remove();
    card.classList.toggle("open", open);
    $(".head", card).setAttribute("aria-expanded", open);
    const cards = all(".card.many");
    unfoldAll.textContent = cards.length && cards.every(c => c.classList.contains("open")) ? "Fold all" : "Unfold all";
  };
  for (const card of all(".card.many")) {
    $(".head", card).addEventListener("click", () => toggle(card, !card.classList.contains("open")));
  }
  unfoldAll.hidden = !$(".card.many");
  unfoldAll.addEventListener("click", () => {
    const cards = all(".card.many"), open = cards.some(card => !card.classList.contains("open"));
    cards.forEach(card => toggle(card, open));
  });
  if (!data.folded) unfoldAll.click();
  for (const side of all(".side input")) {
    side.addEventListener("change", () => document.body.classList.toggle("before", side.value === "before"));
  }

  // -- what is said of a row ------------------------------------------------------------------------------------
  let shown = null;
  const tell = (target, x, y) => {
    if (!target) { tip.classList.remove("on"); shown = null; return; }
    if (shown !== target) {
      shown = target;
      const list = document.createElement("dl");
      for (const [label, value] of data.facts[target.dataset.f]) {
        list.append(text(document.createElement("dt"), label), text(document.createElement("dd"), value));
      }
      const head = text(document.createElement("b"), target.dataset.n);
      head.className = "mono";
      tip.replaceChildren(head, list);
      tip.classList.add("on");
    }
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 16, innerWidth - width - 8))}px`;
    tip.style.top = `${y + 18 + height < innerHeight ? y + 18 : Math.max(8, y - height - 14)}px`;
  };
  document.addEventListener("pointermove", event => {
    if (event.pointerType !== "touch") tell(event.target.closest?.(".row[data-f]"), event.clientX, event.clientY);
  });
  document.addEventListener("focusin", event => {
    const target = event.target.closest(".row[data-f]"), box = target?.getBoundingClientRect();
    if (target) tell(target, box.right - 8, box.top - 18);
    else tell(null);
  });
  document.addEventListener("focusout", () => tell(null));

  // -- search ---------------------------------------------------------------------------------------------------
  const places = [];
  for (const one of all(".row[data-n]")) {
    const card = one.closest(".card.many");
    if (!card) places.push({ key: `${one.dataset.n} ${one.getAttribute("aria-label")}`.toLowerCase(), find: () => one });
    else if (!card.dataset.seen) {
      card.dataset.seen = "1";
      data.groups[card.dataset.g].forEach(([layer, rows], k) => rows.forEach(([, , , name, label], j) => places.push({
        key: `${layer} ${name} ${label}`.toLowerCase(),
        find: () => {
          if (!card.classList.contains("open")) toggle(card, true);
          return all(".row", $(".layers", card).children[k])[j];
        },
      })));
    }
  }
  let hits = [], at = -1;
  const look = () => {
    const wanted = search.value.trim().toLowerCase();
    all(".hit").forEach(hit => hit.classList.remove("hit"));
    hits = wanted ? places.filter(place => place.key.includes(wanted)) : [];
    at = -1;
    found.textContent = wanted ? (hits.length ? `${hits.length} found: Enter shows them` : "nothing found") : "";
  };
  const next = step => {
    if (!hits.length) return;
    at = at < 0 ? (step > 0 ? 0 : hits.length - 1) : (at + step + hits.length) % hits.length;
    all(".hit").forEach(hit => hit.classList.remove("hit"));
    const hit = hits[at].find();
    hit.classList.add("hit");
    hit.scrollIntoView({ block: "center" });
    const box = hit.getBoundingClientRect();
    tell(hit, box.right - 8, box.top - 18);
    found.textContent = `${at + 1} of ${hits.length}`;
  };
  search.addEventListener("input", look);
  search.addEventListener("keydown", event => {
    if (event.key === "Enter") { event.preventDefault(); next(event.shiftKey ? -1 : 1); }
  });
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target === search;
    if (event.key === "/" && !typing) { event.preventDefault(); search.focus(); search.select(); }
    else if (event.key === "Escape") {
      tell(null);
      if (typing) { search.value = ""; look(); search.blur(); }
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && !typing) {
      const stops = all(".row[tabindex],button.head").filter(stop => stop.getClientRects().length);
      const here = stops.indexOf(document.activeElement);
      if (here < 0) return;
      event.preventDefault();
      stops[here + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
    } else if (event.key === "Enter" && event.target.closest?.(".card.many .row")) {
      event.preventDefault(); // or the head, which has the focus then, were pressed too
      const card = event.target.closest(".card.many");
      toggle(card, !card.classList.contains("open"));
      $(".head", card).focus();
    }
  });
})();

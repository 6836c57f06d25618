// The bar at the top: sections, switches, and a chip for each group with its runs.

function buildBar(page) {
  const { report, view } = page;
  const links = h(
    "nav",
    { "aria-label": "sections" },
    report.sections.map((section) => h("a", { href: `#${section.id}` }, section.title)),
  );
  const x = h(
    "select",
    { "aria-label": "x axis", onchange: () => page.change({ x: x.value }) },
    report.x_axes.map(({ key, label }) => h("option", { value: key, selected: key === view.x }, label)),
  );
  const scales = [
    ["auto", "as set"],
    ["linear", "linear"],
    ["log", "log"],
  ];
  const y = h(
    "div",
    { class: "choice", role: "group", "aria-label": "y axis" },
    scales.map(([key, label]) =>
      h(
        "button",
        {
          type: "button",
          "aria-pressed": String(key === view.y),
          "data-key": key,
          onclick: () => page.change({ y: key }),
        },
        label,
      ),
    ),
  );
  const amount = h("output", null, "0");
  const smoothing = h("input", {
    type: "range",
    min: 0,
    max: 0.99,
    step: 0.01,
    value: view.smoothing,
    "aria-label": "smoothing",
    oninput: () => page.change({ smoothing: Number(smoothing.value) }),
  });
  const theme = h(
    "button",
    {
      type: "button",
      class: "theme",
      "aria-label": "light or dark",
      title: "light or dark",
      onclick: () => setTheme(isDark() ? "light" : "dark"),
    },
    "◐",
  );
  const settings = h(
    "div",
    { class: "settings" },
    h("label", null, h("span", null, "x"), x),
    h("label", null, h("span", null, "y"), y),
    h("label", null, h("span", null, "smoothing"), smoothing, amount),
  );
  const chips = buildChips(page);
  const more = h(
    "button",
    {
      type: "button",
      class: "more small",
      "aria-expanded": "false",
      onclick: () => {
        more.setAttribute("aria-expanded", String(find("page-bar").classList.toggle("open")));
      },
    },
    "view",
  );
  find("page-bar").append(
    h(
      "div",
      { class: "row" },
      h("a", { class: "home", href: "#page-top" }, report.title),
      links,
      settings,
      more,
      theme,
    ),
    chips.element,
  );
  page.listeners.push(() => {
    y.querySelectorAll("button").forEach((button) =>
      button.setAttribute("aria-pressed", String(button.dataset.key === view.y)),
    );
    x.value = view.x;
    smoothing.value = view.smoothing;
    amount.textContent = String(view.smoothing);
    chips.show();
  });
  followSections(links);
}

// A click hides or shows, a double click or shift-click leaves only that one (again: all).
function buildChips(page) {
  const { view } = page;
  const buttons = [];
  let wasAlone = false; // before the first click of two
  const chip = (content, ids, title, attributes) => {
    const others = page.report.series.map((run) => run.id).filter((id) => !ids.includes(id));
    const isAlone = () => ids.every((id) => !view.hidden.has(id)) && others.every((id) => view.hidden.has(id));
    const toggle = (event) => {
      if (event.detail < 2) wasAlone = isAlone();
      if (event.shiftKey || event.detail === 2) return page.change({ hidden: new Set(wasAlone ? [] : others) });
      const hidden = new Set(view.hidden);
      const isShown = ids.some((id) => !hidden.has(id));
      for (const id of ids)
        if (isShown) hidden.add(id);
        else hidden.delete(id);
      return page.change({ hidden });
    };
    const button = h("button", { type: "button", title, onclick: toggle, ...attributes }, content);
    buttons.push({ button, ids });
    return button;
  };
  const known = new Set(page.report.groups.map((group) => group.id));
  const loose = page.report.series
    .filter((run) => !known.has(run.group))
    .map((run) =>
      h(
        "span",
        { class: "chip" },
        chip([swatch(PLAIN), shortened(run.name, 32)], [run.id], `${run.name} (${run.state})`, { class: "group" }),
      ),
    );
  const groups = page.report.groups.map((group) => {
    const owner = page.owner({ group: group.id });
    const runs = page.report.series.filter((run) => run.group === group.id);
    const names = shortNames(runs.map((run) => ownName(run.name, null, group)));
    const all = chip(
      [swatch(owner.look), h("span", null, shortened(group.name, 32))],
      runs.map((run) => run.id),
      `${group.name}: click hides or shows, shift-click isolates`,
      { class: "group" },
    );
    const state = (run) => (run.state === "finished" ? "" : " ⚠");
    const each =
      runs.length > 1
        ? runs.map((run, i) =>
            chip((names[i] || String(i)) + state(run), [run.id], `${run.name} (${run.state})`, { class: "run" }),
          )
        : [];
    if (runs.length === 1 && state(runs[0])) all.append(state(runs[0]));
    return h("span", { class: "chip" }, all, each);
  });
  const show = () =>
    buttons.forEach(({ button, ids }) =>
      button.setAttribute("aria-pressed", String(ids.some((id) => !view.hidden.has(id)))),
    );
  show();
  return { element: h("div", { class: "chips", role: "group", "aria-label": "runs" }, groups, loose), show };
}

// "seed 0", "seed 1" -> "0", "1": without the words that all begin with.
function shortNames(names) {
  const words = names.map((name) => name.split(" "));
  let same = 0;
  while (names.length > 1 && words.every((each) => each.length > same + 1 && each[same] === words[0][same]))
    same += 1;
  return words.map((each) => shortened(each.slice(same).join(" "), 16));
}

// The link of the section that is read now is marked.
function followSections(links) {
  if (!("IntersectionObserver" in window)) return;
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        for (const link of links.children) {
          if (link.getAttribute("href") === `#${target.id}`) link.setAttribute("aria-current", "true");
          else link.removeAttribute("aria-current");
        }
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  find("page-sections")
    .querySelectorAll("section")
    .forEach((section) => observer.observe(section));
}

const isDark = () =>
  (document.documentElement.dataset.theme ??
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const setTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
};

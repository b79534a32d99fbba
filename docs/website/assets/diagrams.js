// Draw the page's Mermaid diagrams, and draw them anew when the reader switches between light and dark.
// Mermaid is 3.5 MB, so it is loaded only where there is something to draw.
(() => {
  const folder = new URL(".", document.currentScript.src);
  const figures = [];
  // Mermaid's own dark colours are for a grey page; these are for one that is nearly black.
  const NIGHT = {
    mainBkg: "#252a35",
    nodeBorder: "#6b7385",
    clusterBkg: "#14171d",
    clusterBorder: "#444b5a",
    edgeLabelBackground: "#0c0d11",
    labelBackground: "#0c0d11",
    lineColor: "#a9b0c0",
  };

  function load(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = new URL(name, folder);
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${script.src} cannot be loaded`));
      document.head.append(script);
    });
  }

  async function draw() {
    const isDark = document.body.dataset.mdColorScheme === "slate";
    mermaid.initialize({
      startOnLoad: false,
      securityLevel: "strict",
      fontFamily: getComputedStyle(document.body).fontFamily,
      theme: isDark ? "dark" : "neutral",
      themeVariables: isDark ? NIGHT : {},
    });
    for (const [index, { figure, source }] of figures.entries()) {
      try {
        figure.innerHTML = (await mermaid.render(`diagram-${index}`, source)).svg;
        // A diagram that is too wide shrinks to two thirds at most, so that its words can be read, then it scrolls.
        const svg = figure.firstElementChild;
        svg.style.minWidth = `${0.66 * svg.viewBox.baseVal.width}px`;
      } catch (error) {
        document.getElementById(`ddiagram-${index}`)?.remove(); // what Mermaid leaves behind when it fails
        console.error(`diagram ${index + 1} of this page: ${error.message}`);
      }
    }
  }

  async function begin() {
    for (const block of document.querySelectorAll("pre.diagram")) {
      const figure = document.createElement("figure");
      figure.className = "diagram";
      figures.push({ figure, source: block.textContent });
      block.replaceWith(figure);
      figure.append(block); // readable as text until it is drawn, or where it cannot be
    }
    if (!figures.length) return;
    await load("mermaid.min.js");
    let drawing = draw();
    const redraw = () => (drawing = drawing.then(draw)); // one after the other
    new MutationObserver(redraw).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  }

  begin();
})();

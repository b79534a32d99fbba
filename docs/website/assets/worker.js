// The search runs in a worker, which browsers refuse to a page that was opened from a folder. There, this stands in for it:
// the worker's script runs in a hidden frame of the page, and a message is a call of the other side's handler.
if (location.protocol === "file:") {
  window.Worker = class {
    #frame = document.createElement("iframe");
    #isReady;

    constructor(url) {
      this.#frame.hidden = true;
      document.body.append(this.#frame);
      const inside = this.#frame.contentWindow;
      inside.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
      const script = inside.document.createElement("script");
      script.src = url;
      this.#isReady = new Promise((resolve) => (script.onload = resolve));
      script.onerror = (error) => this.onerror?.(error);
      inside.document.body.append(script);
    }

    postMessage(data) {
      this.#isReady.then(() => this.#frame.contentWindow?.onmessage({ data }));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}

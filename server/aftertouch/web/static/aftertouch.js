// Aftertouch for pages: subscribes this browser to web push and says whose it is.
//
//   const push = new Aftertouch({ server: "https://hooks.example.com", app: "acme" });
//   await push.refresh(identity);       // on every page: keeps an existing subscription current
//   await push.subscribe(identity);     // after a click: asks for permission
//   await push.unsubscribe();
//
// An identity is what your backend made with sign_identity of the Python client; nobody can make one in a page.
"use strict";

globalThis.Aftertouch = class Aftertouch {
  #base;
  #workerUrl;

  constructor({ server, app, worker = "/aftertouch-worker.js", channel = "push" }) {
    this.#base = `${server.replace(/\/+$/, "")}/v1/browsers/${channel}/${app}`;
    this.#workerUrl = `${worker}?base=${encodeURIComponent(this.#base)}`;
  }

  // "unsupported", "denied", "unsubscribed" or "subscribed".
  async state() {
    if (!("serviceWorker" in navigator && "PushManager" in globalThis && "Notification" in globalThis)) return "unsupported";
    if (Notification.permission === "denied") return "denied";
    return (await this.#find()) ? "subscribed" : "unsubscribed";
  }

  // Asks for permission where it was not given yet, so call it when the visitor clicked on something.
  async subscribe(identity) {
    if ((await this.state()) === "unsupported") throw new Error("this browser has no web push");
    if ((await Notification.requestPermission()) !== "granted") return "denied";
    await navigator.serviceWorker.register(this.#workerUrl);
    const registration = await navigator.serviceWorker.ready;
    await this.#renew(registration, identity);
    return "subscribed";
  }

  // Registers an existing subscription again: for who is logged in now, under the key of today, with the endpoint of today.
  async refresh(identity) {
    const state = await this.state();
    // A subscription that the browser ended, and the worker could not renew, is kept still.
    const isOurs = state === "subscribed" || (state === "unsubscribed" && (await this.#findKept()));
    if (!isOurs || Notification.permission !== "granted") return state;
    await navigator.serviceWorker.register(this.#workerUrl);
    await this.#renew(await navigator.serviceWorker.ready, identity);
    return "subscribed";
  }

  async unsubscribe() {
    await (await caches.open("aftertouch")).delete("/aftertouch-subscription");
    const subscription = await this.#find();
    if (!subscription) return "unsubscribed";
    try {
      await this.#call("unsubscribe", { subscription: subscription.toJSON() });
    } finally {
      // Whatever the server says, nothing is shown here any more.
      await subscription.unsubscribe();
    }
    return "unsubscribed";
  }

  async #find() {
    const registration = await navigator.serviceWorker.getRegistration();
    return registration ? registration.pushManager.getSubscription() : null;
  }

  // What the server took last: the worker may have a newer one, with which it did not get through.
  async #findKept() {
    const kept = await (await caches.open("aftertouch")).match("/aftertouch-subscription");
    return kept?.json();
  }

  async #renew(registration, identity) {
    const answer = await fetch(this.#base, { credentials: "omit" });
    if (!answer.ok) throw new Error(`Aftertouch answered ${answer.status}`);
    const key = (await answer.json()).application_server_key;
    const kept = await this.#findKept();
    let subscription = await registration.pushManager.getSubscription();
    let previous = null;
    if (subscription && encode(subscription.options.applicationServerKey) !== key) {
      // A browser takes another key only for a subscription that is new.
      previous = kept ?? subscription.toJSON();
      await subscription.unsubscribe();
      subscription = null;
    }
    subscription ??= await registration.pushManager.subscribe({ userVisibleOnly: true, applicationServerKey: key });
    const given = { ...subscription.toJSON(), application_server_key: key };
    if (!identity) previous ??= kept ?? subscription.toJSON();
    await this.#call("subscribe", { subscription: given, ...(identity && { identity }), ...(previous && { previous }) });
    // The worker needs it when the browser changes the subscription by itself.
    await (await caches.open("aftertouch")).put("/aftertouch-subscription", new Response(JSON.stringify(subscription)));
  }

  async #call(verb, body) {
    const answer = await fetch(`${this.#base}/${verb}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      credentials: "omit",
      body: JSON.stringify(body),
    });
    if (!answer.ok) throw new Error(`Aftertouch answered ${answer.status}: ${await answer.text()}`);
  }
};

function encode(buffer) {
  if (!buffer) return "";
  const text = btoa(String.fromCharCode(...new Uint8Array(buffer)));
  return text.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

// Aftertouch's service worker: shows what was pushed, and reports that it was confirmed, clicked or dismissed.
//
// It has to be served by the site itself, as /aftertouch-worker.js: a copy of this file, or one line,
//   importScripts("https://hooks.example.com/v1/browsers/aftertouch-worker.js");
"use strict";

(() => {
  const base = new URLSearchParams(self.location.search).get("base");
  // Firefox reports a notification as closed after we closed it on a click: https://bugzil.la/1180871
  const clicked = new Set();

  self.addEventListener("push", (event) => {
    const message = read(event.data);
    if (message) event.waitUntil(Promise.all([show(message), report(message, "confirmed")]));
  });

  self.addEventListener("notificationclick", (event) => {
    const message = event.notification.data?.aftertouch;
    if (!message) return;
    clicked.add(message.t);
    event.notification.close();
    const action = message.actions?.find((one) => one.action === event.action);
    event.waitUntil(Promise.all([report(message, "clicked"), self.clients.openWindow(action?.url ?? message.url)]));
  });

  self.addEventListener("notificationclose", (event) => {
    const message = event.notification.data?.aftertouch;
    if (message && !clicked.has(message.t)) event.waitUntil(report(message, "dismissed"));
  });

  self.addEventListener("pushsubscriptionchange", (event) => event.waitUntil(renew(event)));

  // What we sent; null for another sender's message, which another listener of the site may show.
  function read(data) {
    try {
      const message = data.json();
      return typeof message.t === "string" && typeof message.b === "string" ? message : null;
    } catch {
      return null;
    }
  }

  function show({ t, b, title, url, actions, ...options }) {
    const buttons = actions?.map(({ action, title, icon }) => ({ action, title, ...(icon && { icon }) }));
    const data = { aftertouch: { t, b, url, actions } };
    return self.registration.showNotification(title, { ...options, ...(buttons && { actions: buttons }), data });
  }

  // Three times at most: a browser ends a worker that is busy for long. The server counts repeats once.
  async function report({ t, b }, kind) {
    for (const pause of [0, 1000, 4000]) {
      await new Promise((resolve) => setTimeout(resolve, pause));
      try {
        const answer = await fetch(`${b}/${kind}?t=${t}`, { method: "POST", credentials: "omit", keepalive: true });
        if (answer.status < 500) return;
      } catch {
        // Offline just now, perhaps.
      }
    }
  }

  // The browser changed the subscription by itself. Nobody is logged in here: the endpoint that the server took last says whose.
  async function renew(event) {
    const cache = await caches.open("aftertouch");
    const kept = await cache.match("/aftertouch-subscription");
    const previous = (await kept?.json()) ?? event.oldSubscription?.toJSON();
    if (!base || !previous) return;
    const key = (await (await fetch(base, { credentials: "omit" })).json()).application_server_key;
    const manager = self.registration.pushManager;
    const subscription = await manager.subscribe({ userVisibleOnly: true, applicationServerKey: key });
    const body = JSON.stringify({ subscription: { ...subscription.toJSON(), application_server_key: key }, previous });
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(`${base}/subscribe`, { method: "POST", headers, credentials: "omit", body });
    // What is refused is renewed by the next page that refreshes.
    if (answer.ok) await cache.put("/aftertouch-subscription", new Response(JSON.stringify(subscription)));
  }
})();

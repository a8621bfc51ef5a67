// What the pages need besides htmx: times in the viewer's zone, the dialog, and questions before what cannot be undone.
// Nothing here decides anything: a page works without it, less comfortably.
"use strict";

const format = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

function showTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    time.textContent = format.format(moment);
    time.title = moment.toISOString();
  }
}

// A field for a time has no zone: it is filled in, and read by the server, in the viewer's.
function fillTimes(root) {
  for (const field of root.querySelectorAll("[data-time-zone]")) field.value = format.resolvedOptions().timeZone;
  for (const field of root.querySelectorAll("[data-utc]")) {
    const moment = new Date(field.dataset.utc);
    field.value = new Date(moment - moment.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
  }
}

document.addEventListener("DOMContentLoaded", () => {
  showTimes(document);
  fillTimes(document);
});
document.addEventListener("htmx:load", (event) => {
  showTimes(event.detail.elt);
  fillTimes(event.detail.elt);
});

// A browser lets a page copy only where nobody can listen in.
if (navigator.clipboard) {
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).value);
      button.textContent = "Copied";
    });
  }
}

const dialog = document.getElementById("dialog");

if (dialog) {
  const [notice, content] = dialog.children;
  let opener = null;
  // The element that asked is remembered by its id: a row that was counted anew meanwhile is another element.
  document.addEventListener("htmx:beforeRequest", (event) => {
    if (event.detail.target === content) opener = event.detail.elt.id;
  });
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target === content && !dialog.open) dialog.showModal();
  });
  // Nobody can read what is behind an open dialog.
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.isError && dialog.open) event.detail.target = notice;
  });
  dialog.addEventListener("close", () => {
    notice.replaceChildren();
    content.replaceChildren();
    document.getElementById(opener)?.focus();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}

document.addEventListener("submit", (event) => {
  // A form that htmx sends stays on its page.
  if (event.defaultPrevented) return;
  const question = event.submitter?.dataset.confirm;
  if (question && !window.confirm(question)) return event.preventDefault();
  // Whatever a form still wants to save is in what it sends now.
  event.target.dataset.leaving = "yes";
  htmx.trigger(event.target, "htmx:abort");
});

document.addEventListener("htmx:beforeRequest", (event) => {
  if (event.detail.elt.closest("[data-leaving]")) event.preventDefault();
});

window.addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("[data-leaving]")) delete form.dataset.leaving;
});

// A refused part of a page is shown on top. It goes when the same is asked for with success, or anything that somebody does:
// what a page asks for again and again by itself says nothing of whatever else was refused.
let refused = null;
document.addEventListener("htmx:afterRequest", ({ detail }) => {
  const path = detail.pathInfo.requestPath;
  if (detail.failed) refused = path;
  if (!detail.successful || (path !== refused && detail.requestConfig.elt.matches("[hx-trigger*=every]"))) return;
  for (const notice of document.querySelectorAll(".notice")) notice.replaceChildren();
});

// What others wrote in JavaScript, for test_peers.py: the first argument says which part, standard input what it is asked.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { sign, verify } from "@octokit/webhooks-methods";

const require = createRequire(import.meta.url);
const [, , part] = process.argv;

function answer(value) {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

async function answerEach(work) {
  answer(await Promise.all(JSON.parse(readFileSync(0, "utf8")).map(work)));
}

async function servePush() {
  const PushApiModel = require("web-push-testing/src/PushApiModel").PushApiModel;
  const Server = require("web-push-testing/src/server");
  const model = new PushApiModel();
  const server = new Server(model, 0);
  server.setRequestHandlers();
  // Not by its own startServer, which listens on every interface.
  const listening = server._app.listen(0, "127.0.0.1", () => {
    const { port } = listening.address();
    model.notifyUrl = `http://127.0.0.1:${port}/notify/`;
    answer(port);
  });
}

const parts = {
  "twilio-signatures": () => {
    const { getExpectedTwilioSignature } = require("twilio/lib/webhooks/webhooks");
    return answerEach(({ token, url, form }) => getExpectedTwilioSignature(token, url, form));
  },
  "octokit-signatures": () => answerEach(({ secret, body }) => sign(secret, body)),
  "octokit-verdicts": () => answerEach(({ secret, body, signature }) => verify(secret, body, signature)),
  "push-service": servePush,
};
await parts[part]();

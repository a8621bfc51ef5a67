// A sale by WhatsApp, and an SMS to those who did not read it. Start `aftertouch serve --sandbox`, then run this with the key
// that it prints in AFTERTOUCH_API_KEY:
//   npm ci && npm run generate && npm run build && npm start

import { setTimeout as sleep } from "node:timers/promises";

import { createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { type Campaign, Campaign_State, Campaigns } from "./generated/aftertouch/v1/campaigns_pb.js";
import { Retargeting } from "./generated/aftertouch/v1/retargeting_pb.js";

const authorize: Interceptor = (next) => (request) => {
  request.header.set("authorization", `Bearer ${process.env.AFTERTOUCH_API_KEY}`);
  return next(request);
};
const transport = createGrpcTransport({
  baseUrl: `http://${process.env.AFTERTOUCH_ADDRESS ?? "127.0.0.1:7070"}`,
  interceptors: [authorize],
});
const campaigns = createClient(Campaigns, transport);
const retargeting = createClient(Retargeting, transport);

// Launch a campaign and wait until everybody was dealt with.
async function send(name: string): Promise<Campaign> {
  await campaigns.launchCampaign({ name });
  let campaign = await campaigns.getCampaign({ name });
  while (campaign.state === Campaign_State.SENDING) {
    await sleep(500);
    campaign = await campaigns.getCampaign({ name });
  }
  console.log(`${campaign.displayName}: ${Campaign_State[campaign.state]}, ${campaign.counts?.recipients} people`);
  return campaign;
}

const sale = await campaigns.createCampaign({
  parent: "apps/sandbox",
  campaign: {
    displayName: "Spring Sale",
    channel: "whatsapp",
    content: { template: "spring_sale", language: "en_US", body: ["{{ first_name | default: 'there' }}"] },
    audience: { kind: { case: "allSubscribers", value: {} } },
  },
});
await send(sale.name);
await sleep(3_000); // the sandbox's people read within some two seconds

for (const { action, count } of (await retargeting.listActions({ parent: sale.name })).actions) {
  console.log(`${action?.displayName}: ${count}`);
}

const selection = { source: sale.name, action: "not_read" };
const preview = await retargeting.previewRetarget({ selection, channel: "sms" });
console.log(`${preview.matchedCount} did not read it, ${preview.audienceCount} of them can be reached by SMS`);

const wave = await retargeting.createRetarget({ selection, channel: "sms" });
const content = { body: "{{ first_name | default: 'Hello' }}, the sale ends tonight" };
await campaigns.updateCampaign({ campaign: { name: wave.name, content } });
await send(wave.name);

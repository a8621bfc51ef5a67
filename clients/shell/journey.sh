#!/usr/bin/env bash
# Five minutes with buf curl: a sale by WhatsApp, and an SMS to those who did not read it.
# Start `aftertouch serve --sandbox`, then run this with the key that it prints in AFTERTOUCH_API_KEY.
set -euo pipefail

# --8<-- [start:call]
call() {
  buf curl --protocol grpc --http2-prior-knowledge --header "authorization: Bearer $AFTERTOUCH_API_KEY" \
    --data "$2" "http://${AFTERTOUCH_ADDRESS:-127.0.0.1:7070}/aftertouch.v1.$1"
}
# --8<-- [end:call]

# --8<-- [start:send]
call Campaigns/CreateCampaign '{"parent": "apps/sandbox", "campaign_id": "summer-sale", "campaign": {
  "display_name": "Summer Sale", "channel": "whatsapp", "audience": {"all_subscribers": {}},
  "content": {"template": "summer_sale", "language": "en_US", "body": ["{{ first_name | default: \"there\" }}"]}}}'

call Campaigns/LaunchCampaign '{"name": "apps/sandbox/campaigns/summer-sale"}'
# --8<-- [end:send]

until call Campaigns/GetCampaign '{"name": "apps/sandbox/campaigns/summer-sale"}' | grep -q '"state": "SENT"'; do sleep 1; done
sleep 3

# --8<-- [start:hear]
call Campaigns/GetCampaign '{"name": "apps/sandbox/campaigns/summer-sale"}'
call Retargeting/ListActions '{"parent": "apps/sandbox/campaigns/summer-sale"}'
# --8<-- [end:hear]

# --8<-- [start:retarget]
call Retargeting/PreviewRetarget '{"channel": "sms",
  "selection": {"source": "apps/sandbox/campaigns/summer-sale", "action": "not_read"}}'

call Retargeting/CreateRetarget '{"channel": "sms", "campaign_id": "summer-sale-sms",
  "selection": {"source": "apps/sandbox/campaigns/summer-sale", "action": "not_read"}}'

call Campaigns/UpdateCampaign '{"campaign": {"name": "apps/sandbox/campaigns/summer-sale-sms",
  "content": {"body": "{{ first_name | default: \"Hello\" }}, the sale ends tonight"}}}'

call Campaigns/LaunchCampaign '{"name": "apps/sandbox/campaigns/summer-sale-sms"}'
# --8<-- [end:retarget]

# --8<-- [start:follow]
call Retargeting/CreateFollowUps '{"source": "apps/sandbox/campaigns/summer-sale", "steps": [
  {"selection": {"action": "not_received"}, "delay": "86400s", "holdout_percent": 10,
   "channel": "sms", "content": {"body": "{{ first_name | default: \"Hello\" }}, the sale ends tonight"}},
  {"selection": {"action": "not_delivered"}, "delay": "3600s",
   "channel": "push", "content": {"title": "Last call", "body": "The sale ends tonight", "url": "https://shop.example/"}}]}'
# --8<-- [end:follow]

# --8<-- [start:report]
call Retargeting/GetChainReport '{"name": "apps/sandbox/campaigns/summer-sale"}'
# --8<-- [end:report]

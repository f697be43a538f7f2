/** Where notifications can go, and what each of these needs to know. */

export interface Part {
  /** Its name in the channel's config. */
  name: string;
  label: string;
  hint: string;
}

export interface Kind {
  name: string;
  text: string;
  parts: readonly Part[];
}

const url = (hint: string): readonly Part[] => [{ name: "url", label: "Address", hint }];

export const KINDS: readonly Kind[] = [
  { name: "webhook", text: "Webhook", parts: url("https://…, which gets a signed POST") },
  { name: "slack", text: "Slack", parts: url("https://hooks.slack.com/services/…") },
  { name: "discord", text: "Discord", parts: url("https://discord.com/api/webhooks/…") },
  {
    name: "teams",
    text: "Microsoft Teams",
    parts: url("The address of a workflow, https://….logic.azure.com/…"),
  },
  {
    name: "googlechat",
    text: "Google Chat",
    parts: url("https://chat.googleapis.com/v1/spaces/…"),
  },
  {
    name: "telegram",
    text: "Telegram",
    parts: [
      { name: "bot_token", label: "Bot token", hint: "As @BotFather gave it" },
      { name: "chat_id", label: "Chat", hint: "The id of the chat, or @channel" },
    ],
  },
  {
    name: "matrix",
    text: "Matrix",
    parts: [
      { name: "homeserver", label: "Homeserver", hint: "https://HOST" },
      { name: "access_token", label: "Access token", hint: "Of the account that writes" },
      { name: "room_id", label: "Room", hint: "Its id, !…:HOST" },
    ],
  },
  {
    name: "apprise",
    text: "Another service",
    parts: url("An address of the Apprise library: ntfy://…, mmost://…, zulip://…"),
  },
];

/** The kind of that name; one that is not known yet has an address. */
export function kindOf(name: string): Kind {
  return KINDS.find((each) => each.name === name) ?? { name, text: name, parts: url("") };
}

/**
 * Makes of the table of settings what tells of it: the JSON Schema, and the
 * table in plugins/settings.md. `node scripts/settings.ts` writes both.
 *
 * @module
 */

import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { describeSettings, loadBuiltins } from "../mod.ts";
import type { Plugin, Setting } from "../mod.ts";

/** The JSON Schema of an object of settings. */
function objectSchema(table: Readonly<Record<string, Setting>>) {
  const properties = Object.entries(table).map(([name, setting]) =>
    [name, { type: typeof setting.default, ...setting }] as const
  );
  return {
    type: "object",
    additionalProperties: false,
    properties: Object.fromEntries(properties),
  };
}

/** The JSON Schema of settings.json, with the options of plugins. */
export function settingsSchema(
  plugins: readonly Plugin[],
): Record<string, unknown> {
  const { properties, ...schema } = objectSchema(describeSettings());
  const options = plugins.map(({ name, options = {} }) =>
    [name, objectSchema(options)] as const
  );
  return {
    $schema: "https://json-schema.org/draft/2020-12/schema",
    title: "Settings of Offload: settings.json beside its plugins",
    ...schema,
    properties: {
      $schema: { type: "string" },
      ...properties,
      use: { ...properties.use, properties: Object.fromEntries(options) },
    },
  };
}

/** What the page says of a setting beside its meaning. */
function remarkOn(name: string, plugins: readonly Plugin[]): string {
  if (name === "use") {
    return ": [README.md](README.md#the-built-in-plugins) lists them";
  }
  const choices = plugins.filter((plugin) => name in plugin)
    .map((plugin) => `\`${plugin.name}\``);
  const last = choices.pop();
  if (last === undefined) return "";
  return `: ${["`guix`", ...choices].join(", ")} or ${last}`;
}

/** The table of plugins/settings.md; PLUGINS are the built-in ones to choose among. */
export function settingsTable(plugins: readonly Plugin[]): string {
  const rows = Object.entries(describeSettings())
    .map(([name, { default: usual, description }]) => {
      const value = typeof usual === "object" ? JSON.stringify(usual) : usual;
      const shown = /string|object/.test(typeof usual) ? `\`${value}\`` : value;
      return `| \`${name}\` | ${shown} | ${description}` +
        `${remarkOn(name, plugins)} |\n`;
    });
  const head = "| setting | default | meaning |\n| --- | --- | --- |\n";
  return head + rows.join("");
}

/** Writes schema and table. */
async function main(): Promise<void> {
  const plugins = await loadBuiltins();
  const schema = new URL("../plugins/settings.schema.json", import.meta.url);
  const text = JSON.stringify(settingsSchema(plugins), null, 2);
  writeFileSync(schema, `${text}\n`);
  const page = new URL("../plugins/settings.md", import.meta.url);
  const table = /^\| setting \| default [^]*?\n(?!\|)/m;
  const before = readFileSync(page, "utf8");
  writeFileSync(page, before.replace(table, () => settingsTable(plugins)));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main();

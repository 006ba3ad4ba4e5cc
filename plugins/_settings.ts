/**
 * The settings, and the options of plugins, as JSON Schema has them.
 *
 * @module
 */

import { SETTINGS } from "../mod.ts";
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
  const { properties, ...schema } = objectSchema(SETTINGS);
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

/**
 * JSON Schemas, as far as ours go.
 *
 * @module
 */

// deno-lint-ignore no-explicit-any
type Json = any;

/** Whether a value is as a rule of a schema says, all of it unless told. */
export function conforms(value: Json, schema: Json, rule = schema): boolean {
  const holds = (value: Json, rule: Json) => conforms(value, schema, rule);
  if (rule.$ref) return holds(value, schema.$defs[rule.$ref.slice(8)]);
  if (rule.anyOf) return rule.anyOf.some((it: Json) => holds(value, it));
  if ("const" in rule) return value === rule.const;
  if (rule.type === "string") {
    return typeof value === "string" && value.length >= (rule.minLength ?? 0) &&
      new RegExp(rule.pattern ?? "").test(value);
  }
  if (rule.type === "array") {
    return Array.isArray(value) &&
      value.length <= (rule.maxItems ?? Infinity) &&
      value.every((item) => holds(item, rule.items ?? { const: item })) &&
      (!rule.contains || value.some((item) => holds(item, rule.contains)));
  }
  if (rule.type === "object") {
    const needed = Object.entries(rule.dependentRequired ?? {})
      .flatMap(([name, others]) => name in Object(value) ? others : []);
    const ruleOf = (name: string) =>
      Object.hasOwn(rule.properties ?? {}, name)
        ? rule.properties[name]
        : rule.additionalProperties;
    return value?.constructor === Object &&
      [...rule.required ?? [], ...needed].every((name) => name in value) &&
      Object.entries(value).every(([name, part]) =>
        ruleOf(name) && holds(part, ruleOf(name))
      );
  }
  return typeof value === "number" && value <= (rule.maximum ?? Infinity) &&
    value >= (rule.minimum ?? -Infinity) &&
    (rule.type === "number" || value % 1 === 0);
}

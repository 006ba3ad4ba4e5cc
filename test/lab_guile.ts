// Runs in the lab: says of machine files whether Guile's outcome may change by
// itself, as far as plugins/_guile.ts knows.

import process from "node:process";
import { evaluate } from "../plugins/_guile.ts";
import { makeContext } from "./context.ts";

const { context } = makeContext({ environment: process.env });
const volatile: Record<string, boolean | string> = {};
for (const file of process.argv.slice(2)) {
  const { error, volatile: isVolatile } = await evaluate(context, file);
  volatile[file] = error?.message ?? isVolatile;
}
console.log(JSON.stringify(volatile));

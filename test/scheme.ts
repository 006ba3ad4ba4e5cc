/**
 * Machines in Scheme, as machine files have them.
 *
 * @module
 */

import { evaluateMachineFile, type MachineFile } from "../mod.ts";
import { HOME } from "./lab_machine_file.ts";

/** A host key. */
export const key =
  "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp";

/** A machine in Scheme, with more fields if need be. */
export function machine(more = "", name = '"ada"'): string {
  return `(build-machine (name ${name}) (systems '("x86_64-linux")) (user "u") (host-key "${key}") ${more})`;
}

/** Evaluates a text as the file `f.scm`. */
export function evaluate(
  text: string | Uint8Array,
  home: string | undefined = HOME,
): MachineFile {
  return evaluateMachineFile(text, "f.scm", home);
}

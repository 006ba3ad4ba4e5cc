/**
 * The third-party packages, named in this file alone. Their versions stand in
 * package.json.
 *
 * @module
 */

export { default as cac } from "cac";
// @ts-types="npm:@types/ssh2@^1.15"
export { default as ssh2 } from "ssh2";
// @ts-types="npm:@types/ssh2@^1.15"
export type {
  CipherAlgorithm,
  Client,
  ConnectConfig,
  ParsedKey,
  ServerHostKeyAlgorithm,
} from "ssh2";
export { default as nacl } from "tweetnacl";
export { default as glob } from "tiny-glob";

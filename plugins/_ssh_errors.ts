/**
 * Says why a machine can't be logged in to over SSH, and what may help.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { OffloadError, parseHostKey, reason, sshKeyType } from "../mod.ts";
import type { Machine, Refusal, SshError } from "../mod.ts";

/** The fingerprint of an SSH public key, as OpenSSH shows it. */
export function fingerprint(key: Buffer): string {
  const hash = createHash("sha256").update(key).digest("base64");
  return `SHA256:${hash.replace(/=+$/, "")}`;
}

/** The command that logs in as we do, for an administrator to try. */
export function sshCommand({ name, port, user, privateKey }: Machine): string {
  return `ssh -p ${port} -i ${privateKey} ${user}@${name}`;
}

function hostKeyError(machine: Machine, shown: Buffer): OffloadError {
  const { type, key } = parseHostKey(machine);
  const [kind] = /rsa|ecdsa|ed25519/.exec(sshKeyType(shown) ?? "") ?? [];
  return new OffloadError(
    `server at '${machine.name}' returned host key ` +
      `'${shown.toString("base64")}' of type '${sshKeyType(shown)}' ` +
      `instead of '${key.toString("base64")}' of type '${type}'`,
    {
      code: "host-key",
      hint: `run 'ssh-keygen -l -f /etc/ssh/ssh_host_${kind}_key.pub' there: ` +
        `if it says ${fingerprint(shown)}, correct the machine's host-key; ` +
        "if not, that is another machine",
    },
  );
}

/** The server takes the key and still lets nobody in. */
function partialSuccess(
  { name, user }: Machine,
  left: readonly string[],
): OffloadError {
  const wanted = left.join("' or '");
  const message =
    `'${name}' accepted the SSH key and wants '${wanted}' as well`;
  return new OffloadError(message, {
    code: "authentication",
    hint: "nobody can answer it here: exempt the account at the end of " +
      `/etc/ssh/sshd_config there, by 'Match User ${user}' and below it ` +
      "'AuthenticationMethods publickey'",
  });
}

/** The two sides know no algorithm in common for what is `lacking`. */
function negotiationError(
  { name, port, hostKey }: Machine,
  lacking: string,
  cause: SshError,
): OffloadError {
  const [type] = hostKey.trim().split(/\s+/);
  const isKey = lacking.startsWith("host key");
  const message = `failed to connect to '${name}': no common ${lacking}`;
  return new OffloadError(message, {
    cause,
    code: isKey ? "host-key" : "connect",
    hint: isKey
      ? `it has no key of type '${type}': see 'ssh-keyscan -p ${port} ` +
        `${name}' and correct the machine's host-key`
      : "set 'connect' to \"openssh\", and the system's ssh connects, which " +
        "may know more, or have sshd there offer more",
  });
}

/** Says why a connection failed, and what may help. */
export default function connectionError(
  machine: Machine,
  cause: SshError | Refusal,
): OffloadError {
  const { name, user, port, privateKey } = machine;
  if ("shown" in cause) return hostKeyError(machine, cause.shown!);
  if ("wanted" in cause) return partialSuccess(machine, cause.wanted!);
  if ((cause as SshError).level === "client-authentication") {
    return new OffloadError(
      `SSH public key authentication failed for '${name}': access denied`,
      {
        cause,
        code: "authentication",
        hint: `add the public key of '${privateKey}' to ` +
          `~${user}/.ssh/authorized_keys there: run ` +
          `'ssh-copy-id -p ${port} -i ${privateKey}.pub ${user}@${name}'`,
      },
    );
  }
  const [, lacking] = /: no matching (.+)/.exec(cause.message) ?? [];
  if (lacking !== undefined) return negotiationError(machine, lacking, cause);
  return new OffloadError(`failed to connect to '${name}': ${reason(cause)}`, {
    cause,
    code: "connect",
    hint: `check that it is up and that sshd listens on its port ${port}: ` +
      `try '${sshCommand(machine)}'`,
  });
}

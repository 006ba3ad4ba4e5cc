/**
 * Machines that lie in what they send as outputs.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { encode } from "../../mod.ts";
import { directory, file, link, nar } from "../nars.ts";
import { STDERR, unsignedExport, withSignature } from "./liar.ts";
import {
  absurdFile,
  absurdName,
  changes,
  closesInArchive,
  deep,
  DONE,
  endless,
  flip,
  itemName,
  longName,
  manyFiles,
  MEBIBYTE,
  noise,
  sends,
  signed,
  slowly,
  STORE,
} from "./lies.ts";
import type { Row } from "./lies.ts";

/** A machine of each kind. */
export const OUTPUT_ROWS: readonly Row[] = [
  // Outputs.
  {
    machine: "builds in no time and has no output",
    lies: () => ({
      answers: { exportPath: () => encode(STDERR.error, "no such item", 1) },
    }),
    says: /error: .*no such item/,
  },
  {
    machine: "sends nothing for an output",
    lies: () => ({ item: () => Buffer.alloc(0) }),
    says: /archive from '.*unexpected end of data/,
    quick: true,
  },
  {
    machine: "says that it failed to export",
    lies: () => ({
      answers: { exportPath: () => encode(STDERR.last, 0) },
    }),
    says: /guix-daemon on '.*failed to export/,
  },
  {
    machine: "signs nothing",
    lies: () => ({
      item: (path) =>
        withSignature(unsignedExport(nar(file("x")), { path }), undefined),
    }),
    says: /archive from '.*it lacks a signature/,
    quick: true,
  },
  {
    machine: "sends the signature of another item",
    lies: changes(async (item, path) => {
      const other = await signed(file("another output"), path);
      return Buffer.concat([
        item.subarray(0, item.indexOf("(signature") - 16),
        other.subarray(other.indexOf("(signature") - 16),
      ]);
    }),
    says: /archive from '.*invalid hash/,
    quick: true,
  },
  {
    machine: "flips a bit of the contents",
    lies: changes((item) => flip(item, item.indexOf("a good output"))),
    says: /archive from '.*invalid hash/,
  },
  {
    machine: "flips a bit of the signature's s",
    lies: changes((item) => {
      const at = item.indexOf("(s #") + 10;
      const copy = Buffer.from(item);
      copy[at] = copy[at] === 0x30 ? 0x31 : 0x30; // a hexadecimal digit
      return copy;
    }),
    says: /archive from '.*invalid signature/,
    quick: true,
  },
  {
    machine: "signs with a key of its own",
    lies: changes((item) => {
      const at = item.indexOf("(q #") + 10;
      const copy = Buffer.from(item);
      copy[at] = copy[at] === 0x30 ? 0x31 : 0x30;
      return copy;
    }),
    says: /archive from '.*unauthorized public key/,
  },
  {
    machine: "sends nonsense for a signature",
    lies: () => ({
      item: (path) =>
        withSignature(
          unsignedExport(nar(file("x")), { path }),
          "(".repeat(16384),
        ),
    }),
    says: /: invalid s-expression/,
  },
  {
    machine: "sends an item that was not asked for",
    lies: () => ({
      item: () => signed(file("evil"), `${STORE}/${itemName("evil")}`),
    }),
    says: /archive from '.*unexpected store item/,
    quick: true,
  },
  {
    machine: "sends an item that is in no store",
    lies: () => ({ item: () => signed(file("evil"), "/etc/passwd") }),
    says: /archive from '.*unexpected store item '\/etc\/passwd'/,
  },
  {
    machine: "sends the same output twice",
    lies: (outputs) => ({
      item: () => signed(file("the first"), outputs[0]!),
    }),
    outputs: 2,
    says: /archive from '.*twice/,
  },
  {
    machine: "sends an item too many",
    lies: changes(async (item) =>
      Buffer.concat([
        item,
        encode(1),
        await signed(file("evil"), `${STORE}/${itemName("evil")}`),
      ])
    ),
    says: /archive from '.*more store items than were asked for/,
    quick: true,
  },
  {
    machine: "ends the archive early and goes on",
    lies: changes((item) => Buffer.concat([item, encode(0), MEBIBYTE])),
    says: /archive from '.*unexpected data at the end/,
  },
  {
    machine: "cuts the archive in the middle",
    lies: changes((item) => item.subarray(0, item.length / 2)),
    says: /archive from '/,
    quick: true,
  },
  {
    machine: "closes in the middle of an archive",
    lies: closesInArchive,
    says: /lost connection to '/,
  },
  {
    machine: "sends an archive with a file ../x",
    lies: sends(directory(["../x", file("evil")])),
    says: /archive from '.*invalid nar: file name/,
    quick: true,
  },
  ...["a/b", ".", "..", "", "a\0b", "/etc/passwd"].map((name): Row => ({
    machine: `sends an archive with a file ${JSON.stringify(name)}`,
    lies: sends(directory([name, file("evil")])),
    says: /archive from '.*invalid nar: file name/,
  })),
  {
    machine: "sends an archive with the same name twice",
    lies: sends(directory(["a", file()], ["a", file("evil")])),
    says: /archive from '.*out of order/,
  },
  {
    machine: "sends an archive that is not sorted",
    lies: sends(directory(["b", file()], ["a", file()])),
    says: /archive from '.*out of order/,
  },
  {
    machine: "sends a symlink and then a file through it",
    lies: sends(
      directory(["a", link("/tmp")], ["a", directory(["x", file("evil")])]),
    ),
    says: /archive from '.*out of order/,
    quick: true,
  },
  {
    machine: "sends a setuid file",
    lies: sends(["(", "type", "regular", "setuid", "", "contents", "", ")"]),
    says: /archive from '.*invalid nar/,
  },
  {
    machine: "sends a device",
    lies: sends(["(", "type", "block", ")"]),
    says: /archive from '.*unsupported file type 'block'/,
  },
  ...[2n ** 63n, 2n ** 64n - 1n, 2n ** 31n].map((length): Row => ({
    machine: `sends a file name of ${length} bytes`,
    lies: () => ({ item: () => absurdName(length) }),
    says: /archive from '.*unexpected number/,
  })),
  {
    machine: "sends a file of 2^63 bytes",
    lies: () => ({ item: () => absurdFile(2n ** 63n, MEBIBYTE) }),
    says: /archive from '.*unexpected number/,
    quick: true,
  },
  {
    machine: "sends a file that is shorter than it says",
    lies: () => ({ item: () => absurdFile(2n ** 52n, MEBIBYTE) }),
    says: /archive from '.*unexpected end of data/,
  },
  {
    machine: "sends directories that nest without end",
    lies: sends(deep(100_000)),
    says: /archive from '.*file name is too long/,
    quick: true,
  },
  {
    machine: "sends a name that is no UTF-8 where paths are longest",
    lies: sends(longName()),
    says: /archive from '.*file name is too long/,
  },
  {
    machine: "sends a file without end",
    lies: () => ({
      item: () => endless(absurdFile(2n ** 52n, MEBIBYTE)),
    }),
    variables: [`OFFLOAD_MAXIMUM_ARCHIVE_SIZE=${300 * 2 ** 20}`],
    says: /more than 300\.0 MiB came back/,
    quick: true,
  },
  {
    machine: "sends files without end",
    lies: () => ({ item: () => manyFiles(1e9) }),
    variables: [`OFFLOAD_MAXIMUM_ARCHIVE_SIZE=${2 ** 20}`],
    says: /more than 1\.0 MiB came back/,
  },
  {
    machine: "sends references without end",
    lies: (outputs) => ({
      item: () =>
        endless(
          Buffer.concat([nar(file()), encode(0x4558494e, outputs[0]!)]),
          encode(2 ** 20),
          Buffer.concat(Array(200).fill(encode("x".repeat(4096)))),
        ),
    }),
    says: /archive from '.*(too long|unexpected)/,
  },
  {
    machine: "sends gigabytes that nobody reads, whatever the window",
    lies: () => ({
      floods: true,
      answers: {
        // ssh2 drops what comes where nothing may, not where less may.
        exportPath: () => endless(DONE, MEBIBYTE, Buffer.of(0)),
        buildThings: () => slowly(DONE),
      },
    }),
    says: /lost connection to '.*more than was asked for/,
    quick: true,
  },

  // The same by `guix archive`.
  {
    machine: "sends an archive of noise",
    lies: () => ({
      command: () => Buffer.from(noise(2 ** 20)),
    }),
    variables: ["OFFLOAD_TRANSPORT=archive-command"],
    says: /'/,
  },
  {
    machine: "lacks store items without end",
    lies: () => ({ command: () => endless(MEBIBYTE) }),
    variables: ["OFFLOAD_TRANSPORT=archive-command"],
    says: /lacks more than it was asked about/,
  },
  {
    machine: "lacks another's store item",
    lies: () => ({
      command: (command) =>
        command.includes("--missing")
          ? Buffer.from(`${STORE}/${itemName("secret")}\n`)
          : encode(0),
    }),
    variables: ["OFFLOAD_TRANSPORT=archive-command"],
    says: /archive from '.*is missing/,
  },
];

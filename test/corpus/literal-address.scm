(list (build-machine
  (name "192.0.2.17")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHLoA+WgueyGnvtuv8pzxTrsILtj3EvmtTOM2zsfuX87 root@192.0.2.17")) (build-machine
  (name "2001:db8::17")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEjN+vC3CeA9hrPopnmE7Iaa+e7pTEPjHqgseErun0Id root@2001:db8::17")))

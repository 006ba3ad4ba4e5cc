(list (build-machine
  (name "ada")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVApzsoYaXhZxK4Ln3xW2j0aGfO/HoDKr+734FY73EDsBN0=")))

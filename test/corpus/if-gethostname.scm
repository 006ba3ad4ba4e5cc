(define this-one (gethostname))
(filter build-machine? (list (if (string=? this-one "head") "me" (build-machine
  (name "head")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8ubTOjcX7oJjU6QEukYY0a7raHmteTa86O1fRoFJJN root@head")))
  (if (not (equal? this-one "w1")) (build-machine
  (name "w1")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGDFWQ9y7vKS+VRa/Ci/Y8qR0gFqCiiPkPmjL4nT//yv root@w1")) #f)))

(include "/etc/offload-corpus/files/more.scm")
(list more-machine)

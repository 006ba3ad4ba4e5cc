(load "/etc/offload-corpus/files/more.scm")

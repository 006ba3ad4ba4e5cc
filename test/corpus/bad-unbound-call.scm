(list
  (my-machine "ada"))

(list) #;

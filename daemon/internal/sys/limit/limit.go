// Package limit limits the resources of the server that clients can use. LRU limits the entries of a table, Rates the
// rate of calls, Budget the bytes held, Counts the number of things at a time, and Turns the goroutines that work at a time.
// Every type is safe for concurrent use unless its documentation says otherwise. Any package may import it.
package limit

// Package limit limits the resources of the server that clients can use: the entries of a table (LRU), the rate of calls
// (Rates), the bytes held (Budget), and the number of things at a time (Counts). Every type is safe for concurrent use
// unless its documentation says otherwise. Any package may import it.
package limit

// Package limit bounds what clients can make the server hold or do: how many entries a table keeps, how often a
// key may call, how many bytes wait for a client, how many of a kind there are at a time. Every type is safe for
// concurrent use unless it says otherwise. Any package may import it.
package limit

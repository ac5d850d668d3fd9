package limit

import "container/list"

// LRU is a map of bounded size. A new entry displaces the least recently used one. It is not safe for concurrent use.
type LRU[K comparable, V any] struct {
	max     int
	entries map[K]*list.Element
	order   *list.List // of type entry, the most recently used first
}

type entry[K comparable, V any] struct {
	key   K
	value V
}

// NewLRU returns an LRU with at most max entries.
func NewLRU[K comparable, V any](max int) *LRU[K, V] {
	return &LRU[K, V]{max: max, entries: map[K]*list.Element{}, order: list.New()}
}

// Get returns the value of key, if it has one, and marks key as used.
func (l *LRU[K, V]) Get(key K) (value V, ok bool) {
	e, ok := l.entries[key]
	if !ok {
		return value, false
	}
	l.order.MoveToFront(e)
	return e.Value.(entry[K, V]).value, true
}

// Peek is like Get but does not mark key as used. It changes nothing, so several Peeks may run at once.
func (l *LRU[K, V]) Peek(key K) (value V, ok bool) {
	e, ok := l.entries[key]
	if !ok {
		return value, false
	}
	return e.Value.(entry[K, V]).value, true
}

// Put sets the value of key and marks key as used.
func (l *LRU[K, V]) Put(key K, value V) {
	if e, ok := l.entries[key]; ok {
		e.Value = entry[K, V]{key, value}
		l.order.MoveToFront(e)
		return
	}
	l.entries[key] = l.order.PushFront(entry[K, V]{key, value})
	if l.order.Len() > l.max {
		oldest := l.order.Back()
		delete(l.entries, l.order.Remove(oldest).(entry[K, V]).key)
	}
}

// Len returns the number of entries.
func (l *LRU[K, V]) Len() int { return l.order.Len() }

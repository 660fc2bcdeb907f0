package devrelay

import "sync"

// A bell wakes everybody who waits for a change. The zero value is ready.
type bell struct {
	mu   sync.Mutex
	next chan struct{} // if somebody waits: closed at the next ring
}

// ring wakes those who wait.
func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next != nil {
		close(b.next)
		b.next = nil
	}
}

// heard returns a channel that is closed at the next ring. Who calls it before looking misses no change.
func (b *bell) heard() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil {
		b.next = make(chan struct{})
	}
	return b.next
}

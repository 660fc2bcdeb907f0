// Package nodes keeps the order in which a dial tries the addresses of a relay.
package nodes

import (
	"net/netip"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay/internal/backoff"
)

// Health records which of the relay's addresses have failed recently. The zero value is ready to use. It is safe for concurrent use.
//
// A dial tries the addresses in the resolver's order (RFC 6724), except that an address that has failed comes last for a pause,
// which doubles each time. If all addresses have failed, the order is the resolver's.
type Health struct {
	mu  sync.Mutex
	ill map[netip.AddrPort]illness
}

// illness is the state of an address that has failed and has not worked since.
type illness struct {
	times int       // number of failures; dials that fail together count once
	at    time.Time // when the address failed last
	until time.Time // the address is tried last until then
}

const (
	firstPause   = 30 * time.Second // the first pause
	longestPause = 10 * time.Minute // the longest pause
	kept         = time.Hour        // an address without a new failure is forgotten after this
)

// Order returns addrs in the order in which a dial that begins at now must try them. prefer, if it is one of addrs, is the first.
//
// After the pause of an address, one dial tries it first, and the pause is extended by firstPause for other dials.
func (n *Health) Order(addrs []netip.AddrPort, prefer netip.AddrPort, now time.Time) []netip.AddrPort {
	n.mu.Lock()
	defer n.mu.Unlock()
	first, well, ill := addrs[:0:0], addrs[:0:0], addrs[:0:0]
	for _, addr := range addrs {
		switch i, failed := n.ill[addr]; {
		case addr == prefer:
			first = append(first, addr)
		case failed && now.Before(i.until):
			ill = append(ill, addr)
		default:
			well = append(well, addr)
		}
	}
	if len(first) == 0 && len(well) == 0 {
		return addrs
	}
	order := append(append(first, well...), ill...)
	if i, failed := n.ill[order[0]]; failed {
		if until := now.Add(firstPause); until.After(i.until) {
			i.until = until
			n.ill[order[0]] = i
		}
	}
	return order
}

// Failed records that addr has failed in an attempt that began at began. It returns for how long addr is tried last; 0 if a
// concurrent dial has reported the failure.
func (n *Health) Failed(addr netip.AddrPort, began, now time.Time) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := n.ill[addr]
	if began.Before(i.at) {
		return 0 // addr failed for several dials together
	}
	if n.ill == nil {
		n.ill = make(map[netip.AddrPort]illness)
	}
	for addr, i := range n.ill {
		if now.Sub(i.at) > kept {
			delete(n.ill, addr)
		}
	}
	i.times++
	i.at = now
	pause := backoff.Doubled(firstPause, longestPause, i.times)
	i.until = now.Add(pause)
	n.ill[addr] = i
	return pause
}

// Worked records that addr works.
func (n *Health) Worked(addr netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.ill, addr)
}

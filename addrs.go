package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// nodes records which of the relay's addresses have failed recently. It is safe for concurrent use.
//
// A dial tries the addresses in the resolver's order (RFC 6724), except that an address that has failed comes last for a pause,
// which doubles each time. If all addresses have failed, the order is the resolver's.
type nodes struct {
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
	illFirst = 30 * time.Second // the first pause
	illMost  = 10 * time.Minute // the longest pause
	illKept  = time.Hour        // an address without a new failure is forgotten after this
)

// order returns addrs in the order in which a dial that begins at now must try them. prefer, if it is one of addrs, is the first.
//
// After the pause of an address, one dial tries it first, and the pause is extended by illFirst for other dials.
func (n *nodes) order(addrs []netip.AddrPort, prefer netip.AddrPort, now time.Time) []netip.AddrPort {
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
		i.until = latest(i.until, now.Add(illFirst))
		n.ill[order[0]] = i
	}
	return order
}

// failed records that addr has failed in an attempt that began at began. It returns for how long addr is tried last; 0 if a
// concurrent dial has reported the failure.
func (n *nodes) failed(addr netip.AddrPort, began, now time.Time) time.Duration {
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
		if now.Sub(i.at) > illKept {
			delete(n.ill, addr)
		}
	}
	i.times++
	i.at = now
	pause := backoffUpTo(illFirst, illMost, i.times)
	i.until = now.Add(pause)
	n.ill[addr] = i
	return pause
}

// worked records that addr works.
func (n *nodes) worked(addr netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.ill, addr)
}

// nodeFailed records that addr has failed with e, in an attempt that began at began.
func (c *settings) nodeFailed(addr netip.AddrPort, e *Error, began time.Time) {
	if pause := c.nodes.failed(addr, began, time.Now()); pause > 0 {
		text := fmt.Sprintf("%v has failed and is tried after the relay's other addresses for %v: %s", addr, pause, strings.TrimPrefix(e.Error(), "smtprelay: "))
		c.profile.learned(LearnedInfo{Lesson: LessonAddress, Reply: e.Reply, Text: text})
	}
}

// ofNode reports whether e, from a dial, may be the fault of the address, so that another address may work. That is every
// failure before AUTH, with two exceptions: "too many connections" in words, which a relay counts over all its addresses, and a
// lack of file descriptors.
func (e *Error) ofNode() bool {
	switch e.Op {
	case OpDial:
		return !errors.Is(e.Err, syscall.EMFILE) && !errors.Is(e.Err, syscall.ENFILE)
	case OpGreeting, OpEHLO, OpSTARTTLS, OpTLS:
		return !e.Reply.says(saysTooManyConns, e.Op)
	}
	return false
}

// further reports whether the attempt that ended with e got further than that of other: a reply is further than a connection.
func (e *Error) further(other *Error) bool {
	came := func(e *Error) int {
		switch {
		case e.Op == OpDial:
			return 0
		case e.Reply.Code == 0:
			return 1
		}
		return 2
	}
	return came(e) > came(other)
}

// ofAll returns e, the error of remote, with a note on how many addresses were tried.
func (e *Error) ofAll(remote string, tried int) *Error {
	if tried > 1 {
		note := fmt.Errorf("this was %s; %d addresses of the relay have failed", remote, tried)
		if e.Err != nil {
			note = fmt.Errorf("%w; %v", e.Err, note)
		}
		e.Err = note
	}
	return e
}

// lookup returns the addresses of the relay in the resolver's order. It takes limit at most; 0 means no limit.
func (c *settings) lookup(ctx context.Context, limit time.Duration) ([]netip.AddrPort, error) {
	ctx, cancel := within(ctx, limit)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", c.host)
	if err != nil {
		// The same error as from a net.Dialer.
		return nil, fmt.Errorf("%w; check host and port in Addr", &net.OpError{Op: "dial", Net: "tcp", Err: err})
	}
	port, err := strconv.ParseUint(c.port, 10, 16)
	if err != nil {
		return nil, err // cannot happen: the port was checked
	}
	addrs := make([]netip.AddrPort, len(ips))
	for i, ip := range ips {
		addrs[i] = netip.AddrPortFrom(ip.Unmap(), uint16(port))
	}
	return addrs, nil
}

// maxNodes is how many addresses one dial tries that accept the connection and fail later (RFC 5321, 5.1: at least two). The
// next dial begins with the other addresses.
const maxNodes = 3

// tcpShare is the divisor of Timeouts.Dial for one address while there are others: 3 seconds of 30, enough to send a SYN twice.
const tcpShare = 10

// shareOf returns how long the TCP connect to one address may take, if addrs addresses and the time left remain. 0 means no limit.
func shareOf(limit, left time.Duration, addrs int) time.Duration {
	switch {
	case limit == 0 && addrs == 1:
		return 0
	case limit == 0:
		return defaultDial / tcpShare
	}
	left = max(left, 1) // 0 would mean no limit
	if addrs == 1 {
		return left
	}
	return max(min(limit/tcpShare, left/time.Duration(addrs)), 1)
}

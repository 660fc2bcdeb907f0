package smtprelay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// dial opens a connection for s, as conn.Open does. A failed probe for chunks, and a refused token of Config.Auth, are followed
// by a second attempt. dial fails when ctx ends.
//
// After an error the caller calls leave, which returns when the relay has closed the connection.
func (c *settings) dial(ctx context.Context, s *session) (leave func(), e *Error) {
	began := time.Now()
	if t := c.Trace; t != nil && t.DialStart != nil {
		t.DialStart(ctx, DialStartInfo{Name: c.Name, Addr: c.Addr, Conn: s.id})
	}
	c.stats.dials.Add(1)
	leave, e, again := c.connect(ctx, s)
	if again && ctx.Err() == nil { // the probe for chunks has failed; it is not repeated
		leave()
		leave = func() {}
		if ctx.Err() == nil { // ctx may have ended during leave
			leave, e, _ = c.connect(ctx, s)
		}
	}
	if e != nil && e.Op == OpAuth && e.Reply.Code/100 == 5 && c.Auth != nil && ctx.Err() == nil { // a fresh token may be accepted
		leave()
		leave, e, _ = c.connect(ctx, s)
	}
	info := DialDoneInfo{Name: c.Name, Addr: c.Addr, Remote: s.remote, Conn: s.id, Took: time.Since(began)}
	if e != nil {
		c.stats.dialErrors.Add(1)
		info.Err = e
	} else {
		for _, keyword := range s.Extensions().Keywords {
			info.Extensions = append(info.Extensions, c.said.Scrub(keyword))
		}
		if state := s.TLS(); state != nil {
			info.TLSVersion, info.Resumed = state.Version, state.DidResume
		}
	}
	if t := c.Trace; t != nil && t.DialDone != nil {
		t.DialDone(ctx, info)
	}
	return leave, e
}

// connect is one attempt of dial. If an address fails before AUTH, connect tries the next address, one connection at a time.
// again means that the probe for chunks has failed.
func (c *settings) connect(ctx context.Context, s *session) (leave func(), _ *Error, again bool) {
	c.opening.Store(OpDial)
	limit := c.Timeouts.Dial
	if c.Dial != nil {
		nc, err := dialTCP(ctx, c.Dial, c.Addr, limit)
		if err != nil {
			return func() {}, c.notReached(err), false
		}
		return c.open(ctx, nc, s, false)
	}
	began := time.Now()
	addrs, err := c.lookup(ctx, limit)
	if err != nil {
		return func() {}, c.notReached(err), false
	}
	addrs = c.nodes.Order(addrs, s.node, began)
	left := limit - time.Since(began) // for the TCP connects to all addresses
	var furthest *Error
	var remote string
	for i, greeted := 0, 0; ; i++ {
		began := time.Now()
		s.node, s.remote = addrs[i], addrs[i].String()
		nc, err := dialTCP(ctx, new(net.Dialer).DialContext, s.remote, shareOf(limit, left, len(addrs)-i))
		left -= time.Since(began)
		leave, e := func() {}, (*Error)(nil)
		if err != nil {
			e = c.notReached(err)
		} else {
			greeted++
			leave, e, again = c.open(ctx, nc, s, i+1 < len(addrs) && greeted < maxNodes)
		}
		switch {
		case e == nil:
			c.nodes.Worked(s.node)
			return nil, nil, false
		case ctx.Err() != nil, !e.ofNode(), len(addrs) == 1:
			return leave, e, again
		}
		c.nodeFailed(s.node, e, began)
		if furthest == nil || e.further(furthest) {
			furthest, remote = e, s.remote
		}
		if i+1 == len(addrs) || greeted == maxNodes || limit > 0 && left <= 0 {
			s.remote = remote
			return leave, furthest.ofAll(remote, i+1), false
		}
		leave()
		if ctx.Err() != nil {
			return func() {}, e, false
		}
		c.opening.Store(OpDial)
	}
}

// open makes s ready on nc, a new network connection. hurry means that there are other addresses to try.
func (c *settings) open(ctx context.Context, nc net.Conn, s *session, hurry bool) (leave func(), _ *Error, again bool) {
	if addr := nc.RemoteAddr(); addr != nil {
		s.remote = addr.String()
	}
	var e *conn.OpenError
	if s.Conn, leave, e = conn.Open(ctx, nc, c.conns, s, c.connTrace(s.id), hurry); e != nil {
		return leave, c.explain(ctx, e), e.Step == conn.StepBdat
	}
	limit := c.Limits.MaxMessagesPerConn
	for _, least := range []int{s.Extensions().Limits.MailMax, c.profile.maxMessages()} {
		if least > 0 && (limit == 0 || least < limit) {
			limit = least
		}
	}
	expires := time.Time{}
	if age := c.Limits.MaxConnAge; age > 0 {
		expires = s.Born().Add(age - rand.N(age/10+1))
	}
	s.Bound(limit, expires)
	return nil, nil, false
}

// notReached returns the error for err, with which the network connection has failed.
func (c *settings) notReached(err error) *Error {
	return &Error{Op: OpDial, subject: c.Addr, Outcome: NotAccepted, Scope: ScopeRelay, Err: err}
}

// explain turns the error of conn.Open into an Error, with advice on what to do.
func (c *settings) explain(ctx context.Context, failed *conn.OpenError) *Error {
	e := &Error{Op: opOf(failed.Step), Outcome: NotAccepted, Scope: ScopeRelay, Err: failed.Err, permanent: failed.Permanent}
	if failed.Reply.Code != 0 {
		e.Reply = publicReply(failed.Reply)
	}
	if failed.Clear {
		// Without TLS, an attacker on the network may have sent the reply or broken the handshake.
		e.unproven = true
	}
	if ctx.Err() != nil && e.Err != nil {
		if e.Op == OpDial {
			e.subject = c.Addr
		}
		return e
	}
	c.advise(e, failed)
	return e
}

// advise adds to e, made from failed, what to do about it.
func (c *settings) advise(e *Error, failed *conn.OpenError) {
	switch {
	case e.Op == OpTLS, alertText(e.Err) != "": // with TLS 1.3 the relay's alert arrives after our side of the handshake
		c.explainTLS(e)
	case e.Op == OpGreeting && errors.Is(e.Err, wire.ErrMalformed):
		e.Err = fmt.Errorf("%w; %s", e.Err, noSMTP)
		e.permanent = true
	case e.Op == OpGreeting && e.Reply.Code == 0 && !c.implicit() && (conn.IsTimeout(e.Err) || conn.ClosedByPeer(e.Err)):
		e.Err = fmt.Errorf("%w; %s", e.Err, c.silenceHint())
	case e.Op == OpEHLO && e.Reply.Code/100 == 5:
		e.Err = fmt.Errorf("the relay refuses %q; Config.LocalName sets the name", failed.Said)
	case errors.Is(e.Err, conn.ErrNoSTARTTLS):
		e.Err = fmt.Errorf("the relay does not offer STARTTLS on port %s, or an attacker on the way hides it; nothing was sent in the clear (port 465 speaks TLS from the first byte; TLSNone turns TLS off)", c.port)
	case errors.Is(e.Err, conn.ErrClearAuth):
		e.Err = c.explainClearAuth()
	case e.Op == OpAuth:
		if not, ok := e.Err.(*conn.NotOfferedError); ok {
			e.Err = fmt.Errorf("Config.Auth has chosen %q: the relay offers %s", not.Mechanism, c.offered(not.Offered))
			if failed.Clear && failed.TLSOffered {
				e.Err = fmt.Errorf("%w, and it offers STARTTLS: use TLSStartTLS, or smtp:// in a URL", e.Err)
			}
		}
		c.explainAuth(e)
	}
}

// noSMTP is the advice if the server does not speak SMTP.
const noSMTP = "this is not an SMTP server; check the port"

// explainSilence adds a hint about PIPELINING to e, if the relay offers PIPELINING but did not reply to a group of commands.
func (c *settings) explainSilence(e *Error, ext *wire.Extensions) {
	switch e.Op {
	case OpRset, OpMail, OpRcpt, OpData:
		if c.Pipelining != PipelineOff && e.Outcome == NotAccepted && e.Timeout() && ext.Has("PIPELINING") {
			e.Err = fmt.Errorf("%w; if this happens often, something on the way may break PIPELINING: set Config.Pipelining to PipelineOff", e.Err)
		}
	}
}

// connOptions returns the options of the Client's connections.
func (c *settings) connOptions() *conn.Options {
	t := c.Timeouts
	o := &conn.Options{
		Timeouts: conn.Timeouts{Greeting: t.Greeting, TLS: t.TLS, Command: t.Command, First: t.Outage, Data: t.Data, Write: t.Write,
			Unacked: t.Unacked, FinalReply: t.FinalReply, Drain: t.Drain, Overlap: t.Overlap, Quit: t.Quit},
		LocalName:   c.localName,
		Pipelining:  c.Pipelining != PipelineOff,
		Overlap:     c.Pipelining == PipelineAuto,
		Chunking:    c.Chunking,
		MaxInFlight: c.MaxInFlight,
		Implicit:    c.implicit(),
		Clear:       c.clear,
		Secrets:     func() (username, password string) { return c.Username, c.password.reveal() },
		Said:        &c.said,
		Profile:     relay{&c.profile, &c.stats},
		Progress:    func(step conn.Step) { c.opening.Store(opOf(step)) },
	}
	if c.TLS != TLSNone {
		o.TLS = c.tls
	}
	if c.authenticates() {
		o.Mechanism = c.mechanism
		if c.Auth == nil {
			o.OtherMechanism = c.otherMechanism
		}
	}
	return o
}

// dialTCP opens a connection to addr within limit; 0 means no limit.
func dialTCP(ctx context.Context, dial func(ctx context.Context, network, addr string) (net.Conn, error), addr string, limit time.Duration) (net.Conn, error) {
	ctx, cancel := within(ctx, limit)
	defer cancel()
	nc, err := dial(ctx, "tcp", addr)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w; check host and port in Addr", err)
	case nc == nil:
		return nil, errors.New("Config.Dial has returned neither a connection nor an error")
	}
	// Deadlines bound every wait, and are also how cancellation ends one.
	if err := cmp.Or(nc.SetReadDeadline(time.Time{}), nc.SetWriteDeadline(time.Time{})); err != nil {
		nc.Close()
		return nil, fmt.Errorf("the connection does not support deadlines: %w", err)
	}
	return nc, nil
}

// within returns ctx with a timeout; 0 means none.
func within(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if limit <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, limit)
}

// DialControl returns a function for the Control field of the net.Dialer behind a [Config].Dial. The kernel then aborts a
// connection when sent data is not acknowledged for unacked. It is needed if Dial returns a connection that hides its socket,
// such as one through a proxy. For a *net.TCPConn, or a connection with a SyscallConn method, Timeouts.Unacked does the same.
// The function does nothing on systems other than Linux, for networks other than TCP, and if unacked is 0 or less.
func DialControl(unacked time.Duration) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		if !strings.HasPrefix(network, "tcp") || unacked <= 0 {
			return nil
		}
		var err error
		if gone := c.Control(func(fd uintptr) { err = conn.SetUnacked(fd, unacked) }); gone != nil {
			return gone
		}
		return err
	}
}

// localName returns the argument of EHLO.
func (c *settings) localName(nc net.Conn) string {
	if c.LocalName != "" {
		return c.LocalName
	}
	host, _ := os.Hostname() // "" if unknown
	return ehloName(host, nc.LocalAddr())
}

// ehloName returns host if it is a fully qualified name, else the address literal of local (RFC 5321, 4.1.4).
func ehloName(host string, local net.Addr) string {
	host = strings.TrimSuffix(host, ".")
	if strings.Contains(host, ".") && !strings.HasPrefix(strings.ToLower(host), "localhost.") && validHostName(host) {
		return host
	}
	if addr, ok := local.(*net.TCPAddr); ok {
		if ip, ok := netip.AddrFromSlice(addr.IP); ok {
			return addressLiteral(ip)
		}
	}
	return "[127.0.0.1]"
}

// addressLiteral returns addr in the form for EHLO (RFC 5321, 4.1.3).
func addressLiteral(addr netip.Addr) string {
	if addr = addr.Unmap().WithZone(""); addr.Is4() {
		return "[" + addr.String() + "]"
	}
	return "[IPv6:" + addr.String() + "]"
}

// The addresses of the relay.

// nodeFailed records that addr has failed with e, in an attempt that began at began.
func (c *settings) nodeFailed(addr netip.AddrPort, e *Error, began time.Time) {
	if pause := c.nodes.Failed(addr, began, time.Now()); pause > 0 {
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

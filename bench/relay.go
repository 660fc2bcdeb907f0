// The relay: a small, fast and strict SMTP server that keeps only counts.

package main

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"
)

// relayConfig configures a listener of the relay.
type relayConfig struct {
	RTT         time.Duration `json:"rtt"`
	TLS         tlsMode       `json:"tls"`
	TLS12       bool          `json:"tls12"`        // at most TLS 1.2
	Chunking    bool          `json:"chunking"`     // offer CHUNKING
	MaxConns    int           `json:"max_conns"`    // further connections get 421
	MaxMessages int           `json:"max_messages"` // further MAIL commands on a connection get 421
	Hold        bool          `json:"hold"`         // never answer a final dot
}

// tlsMode says how a connection is protected.
type tlsMode string

const (
	tlsNone     tlsMode = "none"
	tlsStart    tlsMode = "starttls"
	tlsImplicit tlsMode = "implicit"
)

// The name and password that the relay accepts; not a secret.
const (
	username = "bench"
	password = "correct horse battery staple"
)

const maxMessageSize = 64 << 20

// relayReport has the counts of one listener.
type relayReport struct {
	Connections int   `json:"connections"`  // accepted
	Refused     int   `json:"refused"`      // over the limit: answered with 421
	OverLimit   int   `json:"over_limit"`   // MAIL over MaxMessages: answered with 421
	MaxOpen     int   `json:"max_open"`     // connections open at once
	Accepted    int   `json:"accepted"`     // final dots answered with 250
	Duplicates  int   `json:"duplicates"`   // of these, with a Message-ID that was accepted before
	Unnamed     int   `json:"unnamed"`      // of these, without a Message-ID
	Violations  int   `json:"violations"`   // answered with 5xx
	Auths       int   `json:"auths"`        // accepted
	Noops       int   `json:"noops"`        //
	Rsets       int   `json:"rsets"`        //
	Resumed     int   `json:"resumed"`      // TLS sessions
	Octets      int64 `json:"octets"`       // read, above TLS
	Turns       int   `json:"turns"`        // of all connections; 0 without a delay line
	SteadyTurns int   `json:"steady_turns"` // from the first message accepted on a connection to the last
	Steady      int   `json:"steady"`       // messages after the first of a connection

	CPU    time.Duration `json:"cpu"`    // of the relay's process, while the listener was open
	Wall   time.Duration `json:"wall"`   // from the first connection to the last message accepted
	Slices []int         `json:"slices"` // messages accepted in each tenth of a second since the first connection
	First  []firstResult `json:"first"`  // of each connection that had a message accepted, in the order of accepting
}

// firstResult says how soon a connection had its first message accepted.
type firstResult struct {
	Turns   int  `json:"turns"`
	Resumed bool `json:"resumed"`
}

// relay is one listener.
type relay struct {
	cfg      relayConfig
	ln       net.Listener
	tls      *tls.Config
	seed     maphash.Seed
	idle     sync.WaitGroup
	accepted []accepted // of the sessions that are over, under mu

	mu       sync.Mutex // guards the fields below, and accepted
	sessions map[*session]bool
	open     int
	start    time.Time
	report   relayReport
}

type accepted struct {
	at time.Time
	id uint64
}

// newRelay returns a relay that serves ln once serve is called.
func newRelay(cfg relayConfig, ln net.Listener, cert tls.Certificate) *relay {
	r := &relay{
		cfg:      cfg,
		ln:       ln,
		tls:      &tls.Config{Certificates: []tls.Certificate{cert}},
		seed:     maphash.MakeSeed(),
		sessions: make(map[*session]bool),
	}
	if cfg.TLS12 {
		r.tls.MaxVersion = tls.VersionTLS12
	}
	return r
}

// serve accepts connections until the listener is closed.
func (r *relay) serve(newSleeper func() sleeper) {
	for {
		conn, err := r.ln.Accept()
		if err != nil {
			return
		}
		s := &session{relay: r, raw: conn, conn: conn, buf: make([]byte, 64<<10)}
		if r.cfg.RTT > 0 {
			s.line = newLine(conn, r.cfg.RTT, newSleeper)
			s.conn = s.line
		}
		r.mu.Lock()
		if r.start.IsZero() {
			r.start = time.Now()
		}
		r.sessions[s] = true
		r.mu.Unlock()
		r.idle.Add(1)
		go s.run() // ends when either side closes, or by finish
	}
}

// finish closes the listener and all connections, and returns the counts.
func (r *relay) finish() relayReport {
	r.ln.Close()
	r.mu.Lock()
	for s := range r.sessions {
		s.kill()
	}
	r.mu.Unlock()
	r.idle.Wait()

	rep := r.report
	seen := make(map[uint64]bool, len(r.accepted))
	var last time.Time
	for _, a := range r.accepted {
		switch {
		case a.id == 0:
			rep.Unnamed++
		case seen[a.id]:
			rep.Duplicates++
		}
		seen[a.id] = true
		if a.at.After(last) {
			last = a.at
		}
		slice := int(a.at.Sub(r.start) / (100 * time.Millisecond))
		for len(rep.Slices) <= slice {
			rep.Slices = append(rep.Slices, 0)
		}
		rep.Slices[slice]++
	}
	rep.Accepted = len(r.accepted)
	if !last.IsZero() {
		rep.Wall = last.Sub(r.start)
	}
	return rep
}

// session is one connection. All fields but line belong to run; kill closes raw.
type session struct {
	relay *relay
	raw   net.Conn
	line  *line // nil without a delay
	conn  net.Conn
	buf   []byte
	lo    int // buf[lo:hi] is read but not parsed yet
	hi    int
	out   []byte // replies not yet written

	counted     bool // among the open connections
	secured     bool
	resumed     bool
	authorised  bool
	greeted     bool
	mail        bool
	rcpts       int
	messages    int
	head        []byte // the first octets of the message, to find its Message-ID in
	chunkFailed bool
	accepted    []accepted
	firstTurn   int
	lastTurn    int
	count       relayReport
}

// errDone ends a session after its last reply.
var errDone = errors.New("done")

func (s *session) run() {
	r := s.relay
	defer r.idle.Done()
	if s.line != nil {
		s.line.accepted()
	}
	r.mu.Lock()
	if s.counted = r.open < r.cfg.MaxConns; s.counted {
		r.open++
		r.report.Connections++
		r.report.MaxOpen = max(r.report.MaxOpen, r.open)
	} else {
		r.report.Refused++
	}
	r.mu.Unlock()

	s.converse()
	// The slot is free before the client can see the close, as with a relay that counts its own sockets.
	r.mu.Lock()
	if s.counted {
		r.open--
	}
	r.mu.Unlock()
	if len(s.out) > 0 {
		s.conn.Write(s.out)
	}
	s.close()

	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.sessions, s)
	r.accepted = append(r.accepted, s.accepted...)
	t, c := &r.report, &s.count
	t.OverLimit += c.OverLimit
	t.Violations += c.Violations
	t.Auths += c.Auths
	t.Noops += c.Noops
	t.Rsets += c.Rsets
	t.Octets += c.Octets
	if s.resumed {
		t.Resumed++
	}
	if s.line != nil && s.counted {
		t.Turns += s.line.turns()
	}
	if n := len(s.accepted); n > 0 {
		t.Steady += n - 1
		t.SteadyTurns += s.lastTurn - s.firstTurn
		t.First = append(t.First, firstResult{Turns: s.firstTurn, Resumed: s.resumed})
	}
}

// close closes the connection without destroying replies in flight.
func (s *session) close() {
	if s.line != nil {
		s.conn.Close() // through TLS, if any, into the line
		<-s.line.over
		return
	}
	if c, ok := s.conn.(*tls.Conn); ok {
		c.CloseWrite()
	}
	drained := make(chan struct{})
	go func() { // ends when the client closes, or closeGently does
		defer close(drained)
		scratch := make([]byte, 4096)
		for {
			if _, err := s.raw.Read(scratch); err != nil {
				return
			}
		}
	}()
	closeGently(s.raw, drained)
	<-drained
}

func (s *session) kill() {
	if s.line != nil {
		s.line.kill()
		return
	}
	s.raw.Close()
}

func (s *session) reply(text string) {
	s.out = append(s.out, text...)
	s.out = append(s.out, '\r', '\n')
}

// refuse replies with a 5xx, which a correct client never gets.
func (s *session) refuse(text string) {
	s.count.Violations++
	s.reply(text)
}

// fill reads more, after writing all replies at once: they are held back while there is input to read without waiting.
func (s *session) fill() error {
	if len(s.out) > 0 {
		if _, err := s.conn.Write(s.out); err != nil {
			return err
		}
		s.out = s.out[:0]
	}
	if s.lo == s.hi {
		s.lo, s.hi = 0, 0
	} else if s.hi == len(s.buf) {
		if s.lo == 0 {
			return errors.New("line too long")
		}
		s.hi = copy(s.buf, s.buf[s.lo:s.hi])
		s.lo = 0
	}
	n, err := s.conn.Read(s.buf[s.hi:])
	s.hi += n
	s.count.Octets += int64(n)
	if n > 0 {
		return nil
	}
	return err
}

// readLine returns the next line without its CRLF. It is valid until the next fill.
func (s *session) readLine() ([]byte, error) {
	from := 0
	for {
		if i := bytes.IndexByte(s.buf[s.lo+from:s.hi], '\n'); i >= 0 {
			line := s.buf[s.lo : s.lo+from+i]
			s.lo += from + i + 1
			if len(line) == 0 || line[len(line)-1] != '\r' {
				s.refuse("500 5.5.2 bare LF")
				return nil, errDone
			}
			return line[:len(line)-1], nil
		}
		from = s.hi - s.lo
		if from > 4096 {
			s.refuse("500 5.5.2 line too long")
			return nil, errDone
		}
		if err := s.fill(); err != nil {
			return nil, err
		}
	}
}

func (s *session) converse() {
	if s.relay.cfg.TLS == tlsImplicit && s.handshake() != nil {
		return
	}
	if !s.counted {
		s.reply("421 4.7.0 too many connections")
		return
	}
	s.reply("220 relay.example ESMTP")
	for {
		line, err := s.readLine()
		if err != nil || s.command(line) != nil {
			return
		}
	}
}

func (s *session) handshake() error {
	c := tls.Server(s.conn, s.relay.tls)
	if err := c.Handshake(); err != nil {
		return err
	}
	s.conn = c
	s.secured = true
	s.resumed = c.ConnectionState().DidResume
	return nil
}

// command answers one command; its error ends the session.
func (s *session) command(line []byte) error {
	verb, rest, _ := bytes.Cut(line, []byte(" "))
	switch {
	case is(verb, "MAIL"):
		return s.mailFrom(rest)
	case is(verb, "RCPT"):
		switch {
		case !s.mail:
			s.refuse("503 5.5.1 MAIL first")
		case !hasPrefix(rest, "TO:<"):
			s.refuse("501 5.5.4 syntax")
		default:
			s.rcpts++
			s.reply("250 2.1.5 recipient ok")
		}
	case is(verb, "DATA"):
		if s.rcpts == 0 {
			s.refuse("503 5.5.1 RCPT first")
			return nil
		}
		s.reply("354 go ahead")
		return s.data()
	case is(verb, "BDAT"):
		return s.bdat(rest)
	case is(verb, "RSET"):
		s.count.Rsets++
		s.reset()
		s.reply("250 2.0.0 reset")
	case is(verb, "NOOP"):
		s.count.Noops++
		s.reply("250 2.0.0 ok")
	case is(verb, "EHLO"):
		s.ehlo()
	case is(verb, "STARTTLS"):
		if s.secured || s.relay.cfg.TLS != tlsStart {
			s.refuse("503 5.5.1 no TLS here")
			return nil
		}
		if s.lo != s.hi {
			s.refuse("554 5.7.0 commands after STARTTLS")
			return errDone
		}
		s.reply("220 2.0.0 ready")
		if _, err := s.conn.Write(s.out); err != nil {
			return err
		}
		s.out = s.out[:0]
		s.greeted = false
		return s.handshake()
	case is(verb, "AUTH"):
		return s.auth(rest)
	case is(verb, "QUIT"):
		s.reply("221 2.0.0 bye")
		return errDone
	default:
		s.refuse("500 5.5.1 unknown command")
	}
	return nil
}

func (s *session) ehlo() {
	s.reset()
	s.greeted = true
	s.reply("250-relay.example")
	s.reply("250-PIPELINING")
	s.reply("250-8BITMIME")
	s.reply("250-ENHANCEDSTATUSCODES")
	if s.relay.cfg.Chunking {
		s.reply("250-CHUNKING")
	}
	if s.relay.cfg.TLS == tlsStart && !s.secured {
		s.reply("250-STARTTLS")
	} else {
		s.reply("250-AUTH PLAIN LOGIN")
	}
	s.reply("250 SIZE " + strconv.Itoa(maxMessageSize))
}

func (s *session) auth(rest []byte) error {
	mechanism, initial, _ := bytes.Cut(rest, []byte(" "))
	if !s.greeted || s.authorised || s.relay.cfg.TLS != tlsNone && !s.secured {
		s.refuse("503 5.5.1 not now")
		return nil
	}
	ask := func(prompt string) ([]byte, error) {
		s.reply("334 " + prompt)
		answer, err := s.readLine()
		return bytes.Clone(answer), err
	}
	var name, word []byte
	var err error
	switch {
	case is(mechanism, "PLAIN"):
		if len(initial) == 0 {
			if initial, err = ask(""); err != nil {
				return err
			}
		}
		if parts := bytes.Split(decoded(initial), []byte{0}); len(parts) == 3 {
			name, word = parts[1], parts[2]
		}
	case is(mechanism, "LOGIN"):
		if len(initial) == 0 {
			if initial, err = ask("VXNlcm5hbWU6"); err != nil {
				return err
			}
		}
		answer, err := ask("UGFzc3dvcmQ6")
		if err != nil {
			return err
		}
		name, word = decoded(initial), decoded(answer)
	default:
		s.refuse("504 5.5.4 unknown mechanism")
		return nil
	}
	if string(name) != username || string(word) != password {
		s.refuse("535 5.7.8 wrong name or password")
		return nil
	}
	s.authorised = true
	s.count.Auths++
	s.reply("235 2.7.0 welcome")
	return nil
}

func decoded(b []byte) []byte {
	d, err := base64.StdEncoding.DecodeString(string(b))
	if err != nil {
		return nil
	}
	return d
}

func (s *session) mailFrom(rest []byte) error {
	switch {
	case !s.authorised:
		s.refuse("530 5.7.0 authenticate first")
	case s.mail:
		s.refuse("503 5.5.1 transaction open")
	case !hasPrefix(rest, "FROM:<"):
		s.refuse("501 5.5.4 syntax")
	case s.messages == s.relay.cfg.MaxMessages:
		s.count.OverLimit++
		s.reply("421 4.7.0 too many messages on this connection")
		return errDone
	default:
		s.messages++
		s.mail = true
		s.reply("250 2.1.0 sender ok")
	}
	return nil
}

func (s *session) reset() {
	s.mail, s.rcpts, s.chunkFailed = false, 0, false
	s.head = s.head[:0]
}

// keepHead keeps the beginning of a message.
func (s *session) keepHead(b []byte) {
	if room := 2048 - len(s.head); room > 0 {
		s.head = append(s.head, b[:min(room, len(b))]...)
	}
}

var finalDot = []byte("\r\n.\r\n")

// data reads a body up to its final dot, and replies to it.
func (s *session) data() error {
	for s.hi-s.lo < 3 {
		if err := s.fill(); err != nil {
			return err
		}
	}
	if bytes.HasPrefix(s.buf[s.lo:s.hi], finalDot[2:]) {
		s.lo += 3
		return s.accept()
	}
	for {
		b := s.buf[s.lo:s.hi]
		if i := bytes.Index(b, finalDot); i >= 0 {
			s.keepHead(b[:i+2])
			s.lo += i + len(finalDot)
			return s.accept()
		}
		// All but the possible beginning of the final dot is processed.
		if n := len(b) - len(finalDot) + 1; n > 0 {
			s.keepHead(b[:n])
			s.lo += n
		}
		if err := s.fill(); err != nil {
			return err
		}
	}
}

// bdat reads one chunk and replies to it. The octets of a refused chunk are discarded, and it gets one reply (RFC 3030, 2). After
// a chunk refused in a transaction only RSET is possible; one out of order leaves the session unchanged.
func (s *session) bdat(rest []byte) error {
	length, last, hasLast := bytes.Cut(rest, []byte(" "))
	n, err := strconv.ParseInt(string(length), 10, 64)
	if err != nil || n < 0 || hasLast && !is(last, "LAST") {
		s.refuse("501 5.5.4 syntax")
		return errDone
	}
	bad := s.rcpts == 0 || s.chunkFailed || !s.relay.cfg.Chunking
	for n > 0 {
		if s.lo == s.hi {
			if err := s.fill(); err != nil {
				return err
			}
		}
		m := int(min(n, int64(s.hi-s.lo)))
		if !bad {
			s.keepHead(s.buf[s.lo : s.lo+m])
		}
		s.lo += m
		n -= int64(m)
	}
	switch {
	case bad:
		s.chunkFailed = s.mail
		s.refuse("503 5.5.1 no transaction")
	case hasLast:
		return s.accept()
	default:
		s.reply("250 2.0.0 chunk ok")
	}
	return nil
}

// accept accepts the message and replies.
func (s *session) accept() error {
	if s.relay.cfg.Hold {
		for {
			if err := s.fill(); err != nil {
				return err
			}
			s.lo = s.hi
		}
	}
	s.accepted = append(s.accepted, accepted{time.Now(), s.messageID()})
	if s.line != nil {
		s.lastTurn = s.line.turns()
		if len(s.accepted) == 1 {
			s.firstTurn = s.lastTurn
		}
	}
	s.reset()
	s.out = fmt.Appendf(s.out, "250 2.0.0 Ok: queued as %08X\r\n", len(s.accepted))
	return nil
}

// messageID returns a hash of the message's identifier, 0 if it has none.
func (s *session) messageID() uint64 {
	const field = "message-id:"
	for rest := s.head; ; {
		line, more, found := bytes.Cut(rest, []byte("\n"))
		if len(line) < 2 || !found {
			return 0 // the end of the header
		}
		if hasPrefix(line, field) {
			return maphash.Bytes(s.relay.seed, bytes.TrimSpace(line[len(field):]))
		}
		rest = more
	}
}

// is reports whether b is the word, ignoring case.
func is(b []byte, word string) bool { return len(b) == len(word) && hasPrefix(b, word) }

// hasPrefix reports whether b begins with prefix, ignoring case.
func hasPrefix(b []byte, prefix string) bool {
	return len(b) >= len(prefix) && bytes.EqualFold(b[:len(prefix)], []byte(prefix))
}

// medianTurns returns the median of the turns to the first receipt, over the connections that resumed a TLS session, or over
// those that did not; 0 if there are none.
func (r relayReport) medianTurns(resumed bool) int {
	var turns []int
	for _, f := range r.First {
		if f.Resumed == resumed {
			turns = append(turns, f.Turns)
		}
	}
	if len(turns) == 0 {
		return 0
	}
	slices.Sort(turns)
	return turns[len(turns)/2]
}

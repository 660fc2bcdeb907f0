package smtptest

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

const (
	defaultName          = "smtp.test"
	defaultUsername      = "apikey"
	defaultPassword      = "SG.not-a-real-key.for-tests-only"
	defaultMaxConns      = 10
	defaultMaxMessages   = 100
	defaultMaxRecipients = 1000
	defaultMaxSize       = 30 << 20

	// lingerTime is how long the relay keeps reading, and discarding, on a connection that it has closed: closing with unread
	// input would make TCP send RST, which can destroy replies in flight (RFC 1122, 4.2.2.13).
	lingerTime = 2 * time.Second

	// patience is how long Close waits for clients that have something in progress.
	patience = 5 * time.Second

	// lastWords is how long Close waits for the next command of a client that has a transaction open.
	lastWords = 200 * time.Millisecond
)

// A Server is a fake relay. Set its fields between [NewUnstartedServer] and Start or StartTLS, and do not change them later; the
// zero value of each is the default. Once the Server is started, its methods are safe for concurrent use.
type Server struct {
	// Name is the relay's name in the greeting and in the reply to EHLO; "" means "smtp.test".
	Name string

	// Username and Password are the accepted credentials; "" means "apikey" and a fixed key that is obviously fake.
	Username, Password string

	// NoAuth means that AUTH is neither offered nor required.
	NoAuth bool

	// Mechanisms are the SASL mechanisms offered; nil means PLAIN and LOGIN. Others need SASL.
	Mechanisms []string

	// SASL, if not nil, replaces Username and Password: it returns the server side of a mechanism. It is called only for
	// mechanisms of the list, possibly from several goroutines at once.
	SASL func(mechanism string) (SASLServer, error)

	// NoTLS means that STARTTLS is not offered. If it is offered, AUTH is neither offered nor accepted before TLS.
	NoTLS bool

	// TLS, if not nil, is the base of the relay's TLS configuration. It is cloned; empty Certificates are filled in.
	TLS *tls.Config

	// CertNames are the names and addresses in the relay's own certificate; nil means its Addresses, ::1, localhost and Name.
	CertNames []string

	// CertNotAfter is when the relay's own certificate expires; zero means in 2084.
	CertNotAfter time.Time

	// MaxConns is how many connections may be open at once; 0 means 10, negative means no limit. Each further one is greeted with
	// "421 4.7.0 Too many concurrent SMTP connections" and closed.
	MaxConns int

	// MaxMessages is how many MAIL commands a connection may carry, refused ones included; 0 means 100, negative means no limit.
	// The next MAIL is answered "421 4.7.0 Too many messages in this connection", and the connection is closed.
	MaxMessages int

	// MaxRecipients is how many recipients a transaction may have; 0 means 1,000, negative means no limit. Each further one is
	// answered 452.
	MaxRecipients int

	// MaxSize is how many octets a message may have; 0 means 31457280, negative means no limit, and none is announced. A larger
	// message is answered 552, at MAIL if SIZE= announces it, else at its end.
	MaxSize int64

	// Addresses is how many addresses the relay has, like several hosts under one name; 0 means 1. They are 127.0.0.1, 127.0.0.2
	// and so on, all with one port. Without InMemory that needs a system on which all of 127.0.0.0/8 is loopback, such as Linux.
	// Connections, limits, messages and counters are for the Server as a whole; a Fault with Addr strikes at one address only.
	// Resolver resolves every name to these addresses.
	Addresses int

	// Extensions are further lines of the reply to EHLO. For SMTPUTF8, DSN, REQUIRETLS, BINARYMIME, RRVS, DELIVERBY and
	// MT-PRIORITY, the relay then parses the parameters of MAIL and RCPT into [Message.MailOptions] and [Message.RcptOptions].
	// Any other line is only announced: with "LIMITS MAILMAX=5", set MaxMessages to 5 too.
	Extensions []string

	// Without are keywords of lines to omit from the reply to EHLO, such as "PIPELINING", "SIZE" and "8BITMIME". Without
	// PIPELINING, a client that pipelines gets "500 5.5.1 Invalid command: Pipelining not supported" and is disconnected.
	Without []string

	// Chunking offers CHUNKING (RFC 3030), which SendGrid does not. A last chunk that the client cuts short by closing (FIN, not
	// RST) is then accepted as if it were complete, as by go-smtp's server and some other relays.
	Chunking bool

	// Behind says what the relay does with commands that arrive after a final dot before it has replied to the dot.
	Behind Habit

	// KeepRefusedChunks reads the chunk of a refused BDAT as commands and replies to each, instead of discarding it, so that the
	// body of an attacker can become a separate message. A chunk is refused outside a transaction, without an accepted recipient,
	// or by the Reply of a Fault; a transaction in which no chunk was accepted then stays open. Such a relay also accepts
	// commands after EHLO and DATA, and pipelining that it has not offered. go-smtp before 0.25.1 does this. Without Chunking
	// each BDAT is refused, as by nginx's mail proxy if it is configured to announce CHUNKING: see Extensions.
	KeepRefusedChunks bool

	// KeepEnvelopeOnRset replies 250 to RSET but keeps an open transaction, its sender and its recipients. The next MAIL gets 503,
	// RCPT adds a recipient, and the next message goes to all of them.
	KeepEnvelopeOnRset bool

	// Reject maps addresses, in lower case, to the reply that MAIL or RCPT gets for them, such as "550 5.1.1 no such user".
	// For more control, use a Fault.
	Reject map[string]string

	// Delay is a round-trip time: a delay line below TLS delays all data by half of it in each direction, in order and with
	// unlimited bandwidth. Connecting takes one Delay, so that the greeting arrives two Delays after the client began to dial.
	// The close of either side is delayed too.
	Delay time.Duration

	// Buffer is the capacity of a connection in each direction, in octets: what one side can send before the other reads.
	// 0 means the system's, or 64 KiB with InMemory or a Delay.
	Buffer int

	// DropBodies keeps the size and the hash of each message, but not its octets: for bodies that are too large for memory.
	DropBodies bool

	// InMemory uses no sockets. The relay can then be reached only through Dial, or with the configuration that Config returns.
	InMemory bool

	// Listener, if not nil, accepts the connections, in place of a listener that Start opens. Close closes it. It excludes
	// InMemory and more than one of Addresses.
	Listener *net.TCPListener

	// Keep is how many messages, and how many closed connections, a long-running relay remembers for Messages and Conns; 0 means
	// all, negative means none. Stats and Wait count forgotten ones too, but Stats.Duplicates compares only with messages that
	// are remembered.
	Keep int

	// OnMessage, if not nil, is called with each message when the relay has accepted it and before it replies, even if none is
	// kept. It is called from the goroutines of connections, possibly several at once; the client waits meanwhile. It must not
	// change the message's octets.
	OnMessage func(Message)

	// OnLine, if not nil, is called with each line of the transcript that Log gets. Calls are made one at a time and must not
	// block.
	OnLine func(Line)

	// Log, if not nil, gets a transcript of all connections: "C2: NOOP" is what the client sent on the second, "S2: 250 ok" a
	// reply to it, "--2: …" any other event. Messages and secrets are not in it. Writes are made one at a time and must not
	// block.
	Log io.Writer

	// fixed by Start
	started     bool
	implicitTLS bool
	addrs       []string    // "host:port", at least one
	tlsConfig   *tls.Config // nil: no TLS
	cert        *x509.Certificate
	roots       *x509.CertPool
	listeners   []net.Listener // one for each of addrs; none with InMemory
	backend     *smtp.Server
	backends    *backListener
	served      chan struct{} // closed when go-smtp has stopped accepting
	ehlo        []string      // the lines of EHLO's reply that do not depend on the connection
	pipelining  bool
	done        chan struct{} // closed when Close begins

	faults atomic.Pointer[[]*FaultHandle] // copied, never changed; written under mu
	wg     sync.WaitGroup                 // all goroutines but go-smtp's
	logMu  sync.Mutex                     // one line of Log and OnLine at a time

	mu         sync.Mutex // guards the fields below and those of connections and handles that say so; not held across I/O
	closing    bool
	closedAt   time.Time // when closing was set
	opened     int       // connections
	conns      []*conn   // those that are open, and those that are remembered
	over       int       // how many of conns are over
	past       Stats     // the sums over the connections that are forgotten
	open       int
	maxOpen    int
	refused    int              // connections and MAIL commands
	accepted   int              // messages
	messages   []Message        // the messages that are remembered
	grown      chan struct{}    // nil unless Wait is waiting: closed when the next message is accepted
	caFile     string           // file with the relay's own certificate; "" until URL has written it
	seen       map[[32]byte]int // number of remembered messages for each hash of envelope and body
	duplicates int
}

// Habit says what a relay does with commands that arrive after a final dot before it has replied to the dot: in the same read, or
// during the Delay of a Fault at FinalDot.
type Habit int

const (
	// HabitNone: the commands are executed, as RFC 2920 requires.
	HabitNone Habit = iota
	// HabitRefuse: each command gets 503; replies still match commands. Haraka does this.
	HabitRefuse
	// HabitDiscard: the commands are discarded and get no reply.
	HabitDiscard
)

// serveFlag is the address at which the first relay keeps running for manual use. As in httptest, the flag exists only if it is
// given.
var serveFlag string

func init() {
	for _, arg := range os.Args {
		if strings.HasPrefix(strings.TrimLeft(arg, "-"), "smtptest.serve=") {
			flag.StringVar(&serveFlag, "smtptest.serve", "", "if not empty, the first smtptest.Server serves on this address and blocks")
			return
		}
	}
}

// New returns a started Server for a test, and closes it when the test and its subtests have ended, after the clients that
// [Server.Client] has returned. The functions in set are called in order before the start and can change fields; without any, the
// Server is as from [NewServer]. One of them may start the Server itself, such as (*Server).StartTLS. New panics if it cannot
// listen.
func New(tb testing.TB, set ...func(*Server)) *Server {
	tb.Helper()
	s := NewUnstartedServer()
	for _, f := range set {
		f(s)
	}
	if !s.started {
		s.Start()
	}
	tb.Cleanup(s.Close)
	return s
}

// NewServer returns a started Server with all defaults: loopback TCP, its own certificate, STARTTLS, AUTH PLAIN and LOGIN,
// PIPELINING, SIZE 31457280, 8BITMIME, 10 connections, 100 messages on each. The caller must close it. NewServer panics if it
// cannot listen.
func NewServer() *Server {
	s := NewUnstartedServer()
	s.Start()
	return s
}

// NewUnstartedServer returns a Server whose fields can be set before Start or StartTLS.
func NewUnstartedServer() *Server { return &Server{} }

// Start starts a Server whose connections begin in plaintext; it offers STARTTLS unless NoTLS is set. It panics if it cannot
// listen or was started before.
func (s *Server) Start() { s.start(false) }

// StartTLS starts a Server whose connections are TLS from the first octet.
func (s *Server) StartTLS() { s.start(true) }

func (s *Server) start(implicitTLS bool) {
	if s.started {
		panic("smtptest: Server already started")
	}
	s.started, s.implicitTLS = true, implicitTLS
	setDefault(&s.Name, defaultName)
	setDefault(&s.Username, defaultUsername)
	setDefault(&s.Password, defaultPassword)
	setDefault(&s.MaxConns, defaultMaxConns)
	setDefault(&s.MaxMessages, defaultMaxMessages)
	setDefault(&s.MaxRecipients, defaultMaxRecipients)
	setDefault(&s.MaxSize, defaultMaxSize)
	if s.Mechanisms == nil {
		s.Mechanisms = []string{sasl.Plain, sasl.Login}
	}
	s.Addresses = max(1, s.Addresses)
	if s.CertNames == nil {
		s.CertNames = []string{"::1", "localhost", s.Name}
		for n := range s.Addresses {
			s.CertNames = append(s.CertNames, loopback(n))
		}
	}
	if implicitTLS || !s.NoTLS {
		s.makeTLS()
	}
	s.done = make(chan struct{})
	s.seen = make(map[[32]byte]int)
	s.past.Commands = make(map[string]int)
	s.makeEHLO()
	s.startBackend()

	if s.InMemory {
		port := "587"
		if implicitTLS {
			port = "465"
		}
		for n := range s.Addresses {
			s.addrs = append(s.addrs, net.JoinHostPort(loopback(n), port))
		}
		return
	}
	s.listen()
	for n, l := range s.listeners {
		s.addrs = append(s.addrs, l.Addr().String())
		s.wg.Go(func() { s.accept(l, n+1) }) // until Close closes the listener
	}
	if serveFlag != "" {
		fmt.Fprintln(os.Stderr, "smtptest.Server:", s.URL())
		select {}
	}
}

func setDefault[T comparable](p *T, def T) {
	if *p == *new(T) {
		*p = def
	}
}

// makeEHLO builds the reply to EHLO, in SendGrid's order, except for STARTTLS and AUTH.
func (s *Server) makeEHLO() {
	lines := []string{"8BITMIME", "PIPELINING"}
	if s.MaxSize > 0 {
		lines = append(lines, fmt.Sprintf("SIZE %d", s.MaxSize))
	}
	if s.Chunking {
		lines = append(lines, "CHUNKING")
	}
	for _, line := range lines {
		if !containsFold(s.Without, keyword(line)) {
			s.ehlo = append(s.ehlo, line)
		}
	}
	s.ehlo = append(s.ehlo, s.Extensions...)
	s.pipelining = s.offers("PIPELINING")
}

// offers reports whether the reply to EHLO has a line with the keyword.
func (s *Server) offers(kw string) bool {
	for _, line := range s.ehlo {
		if strings.EqualFold(keyword(line), kw) {
			return true
		}
	}
	return false
}

func keyword(line string) string {
	kw, _, _ := strings.Cut(line, " ")
	return kw
}

func containsFold(list []string, s string) bool {
	for _, e := range list {
		if strings.EqualFold(e, s) {
			return true
		}
	}
	return false
}

// The relay's end of a connection, its TLS and its faults, and its replies where no transcript gives them.
package dialogue

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math"
	"math/big"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// A relayConn is the relay's end of a connection.
type relayConn struct {
	d        *dialogue
	n        int // the connection, 1-based
	raw      *netpipe.Conn
	link     *link
	scripted bool        // the script has lines about it
	stalled  atomic.Bool // the relay does not read
	ended    atomic.Bool // the relay has closed, or the connection was lost

	mu     sync.Mutex // guards the fields below; never held across anything that can block
	tls    *tls.Conn  // nil in plaintext
	feed   *feed      // below tls
	fresh  []byte     // sent by the client since take
	spoke  bool       // the client has sent something since the relay's last output
	noted  bool       // clientEnded has reported the client's close
	sent   int        // octets on the network connection
	ledger ledger
	alone  bool // its own goroutine reads and replies
}

// drain reads what the client has written, without waiting for more.
func (c *relayConn) drain() (moved bool) {
	return !c.stalled.Load() && c.read(math.MaxInt) > 0
}

func (c *relayConn) read(limit int) (total int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.alone {
		return 0 // its own goroutine reads
	}
	for {
		n := min(c.raw.Unread(), limit-total)
		if n > 0 {
			buf := make([]byte, n)
			n, _ = c.raw.Read(buf)
			if c.tls == nil {
				c.hearLocked(buf[:n])
			} else {
				c.feed.in.Write(buf[:n])
			}
			total += n
		}
		for c.tls != nil {
			buf := make([]byte, 16<<10)
			k, err := c.tls.Read(buf)
			c.hearLocked(buf[:k])
			if err != nil {
				break
			}
		}
		if n <= 0 {
			return total
		}
	}
}

func (c *relayConn) hearLocked(text []byte) {
	if len(text) == 0 {
		return
	}
	c.d.mu.Lock()
	if !c.spoke {
		c.spoke = true
		c.d.turns++
	}
	c.d.said = append(c.d.said, said{conn: c.n, dir: toRelay, text: string(text), played: len(c.d.played)})
	c.d.mu.Unlock()
	c.log("C", string(text))
	c.fresh = append(c.fresh, text...)
	c.ledger.hear(text)
}

// log adds text to the transcript, with long bodies shortened.
func (c *relayConn) log(who, text string) {
	n := 0
	for line := range strings.Lines(text) {
		if n++; n == 20 {
			c.d.logf(c.n, "%s: (%d octets in all)", who, len(text))
			return
		}
		c.d.logf(c.n, "%s: %s", who, escape(strings.TrimSuffix(line, "\r\n")))
	}
}

// take returns what the client has sent since the last call.
func (c *relayConn) take() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := c.fresh
	c.fresh = nil
	return text
}

// clientEnded reports, once, how the client closed a connection that the relay had not closed: "close", "reset" or "" for not at
// all.
func (c *relayConn) clientEnded() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.noted || !c.link.ended.Load() {
		return ""
	}
	c.noted = true
	switch {
	case c.ended.Load():
		return ""
	case c.link.reset.Load():
		return "reset"
	}
	return "close"
}

// say writes text. It tells the ledger how much of it the client gets: a cut may fall into it.
func (c *relayConn) say(text string) error {
	c.mu.Lock()
	c.spoke = false
	raw := []byte(text)
	if c.tls != nil {
		if _, err := c.tls.Write(raw); err != nil {
			c.mu.Unlock()
			return err
		}
		raw = bytes.Clone(c.feed.out.Bytes())
		c.feed.out.Reset()
	}
	arrives := len(raw)
	if k := c.d.cut; k.on(c, toClient) {
		arrives = max(0, min(arrives, k.at-c.sent))
	}
	c.sent += len(raw)
	if c.tls != nil && arrives < len(raw) {
		arrives = 0 // a record arrives as a whole or not at all
	} else if c.tls != nil {
		arrives = len(text)
	}
	c.ledger.say(text[:arrives])
	c.ledger.lost = arrives < len(text)
	c.ledger.say(text[arrives:])
	c.d.mu.Lock()
	c.d.said = append(c.d.said, said{conn: c.n, dir: toClient, text: text, played: len(c.d.played)})
	c.d.mu.Unlock()
	c.mu.Unlock()
	c.log("S", text)
	_, err := c.raw.Write(raw)
	return err
}

func (c *relayConn) close() {
	c.ended.Store(true)
	c.raw.Close()
}

// handshake is the relay's side of TLS. With fault "wrong-name" it shows a certificate for another host.
func (c *relayConn) handshake(fault string) error {
	certs := certificate()
	cert := certs.good
	if fault == "wrong-name" {
		cert = certs.other
	}
	f := &feed{Conn: c.raw, relay: c, live: true}
	server := tls.Server(f, &tls.Config{Certificates: []tls.Certificate{cert}})
	err := server.Handshake() // returns at the latest when the client's end is closed
	if err != nil {
		return err
	}
	f.live = false
	c.mu.Lock()
	defer c.mu.Unlock()
	c.feed, c.tls = f, server
	c.ledger.secured()
	return nil
}

// A feed lets a tls.Conn work without blocking: it reads what it was given, and keeps what is written.
type feed struct {
	net.Conn
	relay   *relayConn
	live    bool // it reads from and writes to the connection directly
	in, out bytes.Buffer
}

func (f *feed) Read(p []byte) (int, error) {
	switch {
	case f.in.Len() > 0:
		return f.in.Read(p)
	case f.live:
		return f.Conn.Read(p)
	}
	return 0, os.ErrDeadlineExceeded // a tls.Conn survives this error
}

func (f *feed) Write(p []byte) (int, error) {
	if !f.live {
		return f.out.Write(p)
	}
	f.relay.mu.Lock()
	f.relay.sent += len(p)
	f.relay.mu.Unlock()
	return f.Conn.Write(p)
}

type certificates struct {
	good, other tls.Certificate
	roots       *x509.CertPool
}

// certificate makes a certificate for relay.example, and one for another host, under one root. They are valid in 2000 too, when
// bubbles begin.
var certificate = sync.OnceValue(func() (c certificates) {
	c.roots = x509.NewCertPool()
	issue := func(name string) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		template := &x509.Certificate{
			SerialNumber:          big.NewInt(1),
			DNSNames:              []string{name},
			NotBefore:             time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC),
			NotAfter:              time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
			IsCA:                  true,
			BasicConstraintsValid: true,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			panic(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			panic(err)
		}
		c.roots.AddCert(leaf)
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	}
	c.good, c.other = issue("relay.example"), issue("other.example")
	return c
})

// A link is the client's end of a connection. It counts octets, and loses the connection at the cut.
type link struct {
	*netpipe.Conn
	relay   *relayConn
	ended   atomic.Bool // nothing more can be written
	closed  atomic.Bool
	reset   atomic.Bool // by SetLinger
	orderly atomic.Bool // closed by the client, without a reset, before the relay had closed
	deaf    atomic.Bool // writes fail
	read    atomic.Int64
	written atomic.Int64
	writing sync.Mutex // held by a Write until its data can be read, and while the connection is lost
}

func (l *link) Read(p []byte) (int, error) {
	if k := l.relay.d.cut; k.on(l.relay, toClient) && len(p) > 0 {
		room := k.at - int(l.read.Load())
		if room <= 0 {
			return 0, k.lose(l)
		}
		p = p[:min(len(p), room)]
	}
	n, err := l.Conn.Read(p)
	l.read.Add(int64(n))
	return n, err
}

func (l *link) Write(p []byte) (int, error) {
	if l.deaf.Load() {
		return 0, &net.OpError{Op: "write", Net: "pipe", Err: syscall.EPIPE}
	}
	k := l.relay.d.cut
	room := math.MaxInt
	if k.on(l.relay, toRelay) {
		room = k.at - int(l.written.Load())
	}
	l.writing.Lock()
	n, err := l.Conn.Write(p[:min(len(p), room)])
	l.written.Add(int64(n))
	l.writing.Unlock()
	if err == nil && n < len(p) {
		k.lose(l)
		err = &net.OpError{Op: "write", Net: "pipe", Err: syscall.EPIPE}
	}
	return n, err
}

func (l *link) Close() error {
	l.orderlyEnd()
	l.closed.Store(true)
	return l.Conn.Close()
}

func (l *link) orderlyEnd() {
	if !l.ended.Swap(true) && !l.relay.ended.Load() {
		l.orderly.Store(true)
	}
}

// CloseWrite ends the client's output, which a script calls its close.
func (l *link) CloseWrite() error {
	l.orderlyEnd()
	return l.Conn.CloseWrite()
}

func (l *link) SetLinger(sec int) error {
	if sec == 0 {
		l.reset.Store(true)
		l.ended.Store(true)
		l.closed.Store(true)
	}
	return l.Conn.SetLinger(sec)
}

type direction string

const (
	toRelay  direction = "to the relay"
	toClient direction = "to the client"
)

// A cut loses a connection after some octets have passed in one direction.
type cut struct {
	conn   int
	dir    direction
	at     int  // octets
	reset  bool // the client gets ECONNRESET and data in flight is destroyed; else io.EOF after the data in flight
	refuse bool // no other connection can be opened afterwards; else the relay improvises on new ones

	once sync.Once
	lost atomic.Bool
}

func (k *cut) on(c *relayConn, dir direction) bool { return k != nil && k.conn == c.n && k.dir == dir }

func (k *cut) happened() bool { return k.lost.Load() }

// lose ends the connection of l and returns the error of the client's Read.
func (k *cut) lose(l *link) error {
	k.once.Do(func() {
		c := l.relay
		for c.read(math.MaxInt); !l.writing.TryLock(); c.read(math.MaxInt) {
			runtime.Gosched() // to a Write, which may wait for buffer space
		}
		defer l.writing.Unlock()
		c.read(math.MaxInt) // data that passed has arrived, even if the relay was not reading
		c.d.logf(c.n, "(lost after octet %d %s)", k.at, k.dir)
		c.ended.Store(true)
		switch {
		case k.reset:
			c.raw.Reset()
		case k.dir == toRelay:
			c.raw.Close()
		default:
			c.raw.CloseWrite() // as after a FIN, the client may still write
			for n := l.Conn.Unread(); n > 0; n = l.Conn.Unread() {
				l.Conn.Read(make([]byte, n)) // lost; unread input would turn the client's close into a reset
			}
		}
		k.lost.Store(true)
	})
	if k.reset {
		return &net.OpError{Op: "read", Net: "pipe", Err: syscall.ECONNRESET}
	}
	return io.EOF
}

// improvise makes the relay reply without a script, in the client's favour, on existing and new connections.
func (d *dialogue) improvise() {
	d.mu.Lock()
	before := d.off
	d.off = true
	d.dialing = ""
	if d.cut.refuse {
		d.dialing = "refuse"
	}
	conns := d.conns
	d.mu.Unlock()
	if before {
		return
	}
	for _, c := range conns {
		go c.improvise() // ends with the connection
	}
}

func (c *relayConn) improvise() {
	c.mu.Lock()
	c.alone = true
	if c.feed != nil {
		c.feed.live = false
	}
	c.mu.Unlock()
	defer c.close()
	buf := make([]byte, 16<<10)
	for {
		if c.d.needsTLS(c) && c.handshake("") != nil {
			return
		}
		for {
			c.mu.Lock()
			answer, last := c.d.answer(c)
			c.mu.Unlock()
			if answer == "" {
				break
			}
			err := c.say(answer) // after an error the connection is half closed, and the client may still send
			if last {
				return
			}
			if err != nil {
				break
			}
		}
		if c.d.needsTLS(c) {
			continue
		}
		n, err := c.raw.Read(buf)
		c.mu.Lock()
		if c.tls == nil {
			c.hearLocked(buf[:n])
		} else {
			c.feed.in.Write(buf[:n])
			for {
				k, err := c.tls.Read(buf)
				c.hearLocked(buf[:k])
				if err != nil {
					break
				}
			}
		}
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (d *dialogue) needsTLS(c *relayConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tls == nil && (d.script.config["tls"] == "implicit" || c.ledger.starting)
}

// answer is the improvising relay's reply to the oldest command without one.
func (d *dialogue) answer(c *relayConn) (text string, last bool) {
	l := &c.ledger
	if len(l.waiting) == 0 {
		return "", false
	}
	switch w := l.waiting[0]; w.verb {
	case "greeting":
		return "220 relay.example ESMTP\r\n", false
	case "EHLO":
		text = "250-relay.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250-DSN\r\n250-SIZE\r\n"
		if d.script.config["tls"] == "starttls" && c.tls == nil {
			text += "250-STARTTLS\r\n"
		}
		if d.secret != "" {
			text += "250-AUTH PLAIN LOGIN\r\n"
		}
		if d.script.offers("CHUNKING") {
			text += "250-CHUNKING\r\n"
		}
		return text + "250 ENHANCEDSTATUSCODES\r\n", false
	case "STARTTLS":
		return "220 go ahead\r\n", false
	case "AUTH":
		if l.prompts > 0 {
			l.prompts--
			return "334 \r\n", false
		}
		return "235 welcome\r\n", false
	case "DATA":
		if w.tx == nil || !w.tx.anyAccepted() {
			return "554 no valid recipients\r\n", false
		}
		return "354 go\r\n", false
	case "QUIT":
		return "221 bye\r\n", true
	case ".", "BDAT":
		if w.tx == nil || !w.tx.anyAccepted() {
			return "554 no valid recipients\r\n", false
		}
		return "250 ok\r\n", false
	case "MAIL", "RCPT", "RSET", "NOOP", "HELO":
		return "250 ok\r\n", false
	}
	return "500 what?\r\n", false
}

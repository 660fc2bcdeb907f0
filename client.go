package smtprelay

import (
	"context"
	"crypto/tls"
	"fmt"
	"iter"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// Config says which relay a [Client] talks to, and how. The zero value with a Password is a client of SendGrid.
// Printing it, with any verb, as JSON or through log/slog, shows no secret.
type Config struct {
	// Name tells this Client from others in [Stats], in what a [Trace] is told and in its log, and is part of a [Registry]'s key; it
	// may be empty. It is no secret.
	Name string

	// Addr is the relay's "host:port"; empty means "smtp.sendgrid.net:587". The certificate is verified for its host.
	Addr string

	// Username is the user name for AUTH. With a Password it may be empty for SendGrid's hosts only, where it means "apikey".
	Username string

	// Password is the password or API key. Without Username, Password and Auth nothing is authenticated, which relays on
	// a local network may allow. Once the relay has refused it no connection is opened for half a minute, then for twice
	// that, and in the end for five minutes, since some relays lock an account; a Send that needs one fails at once with
	// the relay's words.
	Password string

	// Auth, if not nil, replaces Username and Password. It is asked once for each connection, after EHLO, and returns the
	// mechanism to use, of those that the relay offers: SCRAM, XOAUTH2, OAUTHBEARER, or PLAIN with a key that changes. It may
	// return nil to go on without authentication. By default AUTH PLAIN is used where it is offered and the relay does take it
	// (no 502 or 504), else LOGIN.
	//
	// It may be called from several goroutines at once. An error counts as a connection that could not be opened for now.
	// No time limit is set: ctx ends when the Client is closed, and not with the Send that needs the connection, so that
	// what asks another server for a token needs a limit of its own.
	Auth func(ctx context.Context, s ServerInfo) (Mechanism, error)

	// TLS says how the connection is protected. The zero value, TLSByPort, is right for all well-known relays.
	TLS TLSMode

	// AllowInsecureAuth lets credentials cross a connection without TLS to another machine, where TLS says that there may be
	// such a connection. Without it they cross one only if the host of Addr is localhost or a loopback address, and the
	// connection does not lead elsewhere; else the connection fails, and nothing is sent without authentication instead.
	AllowInsecureAuth bool

	// TLSConfig is cloned. Where they are not set, ServerName becomes the host of Addr, MinVersion TLS 1.2, and
	// ClientSessionCache a cache of the Client's own.
	TLSConfig *tls.Config

	// LocalName is the argument of EHLO. Empty means the full name of this host if it has one, else the address literal
	// of the connection (RFC 5321, 4.1.3); never "localhost" to another machine. Relays refuse names with an underscore, and
	// addresses that are not written as literals ("[192.0.2.1]", "[IPv6:2001:db8::1]"): both are mistakes to [New].
	LocalName string

	Limits   Limits
	Retry    Retry
	Timeouts Timeouts

	// Pipelining says how far commands run ahead of replies where the relay offers PIPELINING (RFC 2920).
	Pipelining Pipelining

	// Chunking sends bodies in chunks (BDAT, RFC 3030) to a relay that offers CHUNKING and PIPELINING: envelope and body
	// leave in one write, and MaxInFlight messages follow one another without a reply. It is off unless asked for: no
	// relay that carries volume offers it (SendGrid, Mailgun and SES do not; Postfix, Exim, Gmail and Microsoft 365 do).
	//
	// The Client first asks each address of the relay, once an hour at most, what it does with a chunk that it refuses, by one
	// that is out of order. An address that does not throw it away gets bodies by DATA. So do connections from Dial that have
	// no RemoteAddr, and bodies that begin with a blank or with the "From " line of a mailbox. On each connection a whole message
	// follows another one without a reply only once the relay has answered an envelope that came together with the end of
	// a message. With a proxy or a load balancer between, all relays behind its address are taken for one.
	//
	// That a relay has done so once is no proof that it always will. One that throws away a whole message behind another and
	// is silent about it, or answers a command of the envelope twice, may have the reply to one command taken for that to
	// another. DATA does not have this risk before the final dot, since its reply, 354, cannot be mistaken for another.
	Chunking bool

	// MaxInFlight is how many messages are on their way on one connection without final reply, with Chunking and a relay that
	// offers it. More of them hide a longer round trip, and a lost connection leaves the fate of each unknown.
	// 0 means 4; 1 means that a lost connection leaves one unknown at most; at most 1,000, and not negative.
	MaxInFlight int

	// Dial opens the network connection; nil means a net.Dialer's DialContext. It may be called from several goroutines at
	// once, and ctx ends after Timeouts.Dial. TLS is added on top where TLS says so. The connection must take deadlines,
	// which one through SSH does not. Like a *net.TCPConn's, its CloseWrite method is used if it has one: to wait for
	// the relay's close.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)

	// Trace, if not nil, is told what happens; see [LogTrace].
	Trace *Trace
}

// ServerInfo is what [Config.Auth] is told about the relay.
type ServerInfo struct {
	Name       string               // the host of Config.Addr
	Mechanisms []string             // what the relay offers, in its order, in upper case
	TLS        *tls.ConnectionState // nil in the clear
}

// Mechanism is the client's side of a SASL mechanism (RFC 4422) for one authentication. Each sasl.Client of
// github.com/emersion/go-sasl is one. Its methods are called from one goroutine at a time.
type Mechanism interface {
	// Start returns the name of the mechanism, which the relay must offer, and the initial response. A nil ir means that
	// there is none; an empty one is sent as "=" (RFC 4954, 4). The bytes are not encoded. An error ends the connection.
	Start() (mech string, ir []byte, err error)

	// Next returns the response to a challenge of the relay, both as they are before base64. After an error the relay is told
	// that the exchange is given up ("*"), and the connection ends.
	Next(challenge []byte) (response []byte, err error)
}

// Pipelining says how far commands run ahead of replies.
type Pipelining int

const (
	// PipelineAuto: the envelope goes in one write, and may follow the final dot of the message before it without
	// waiting: one round trip per message. A relay that turns out not to support that is noticed and spared.
	PipelineAuto Pipelining = iota
	// PipelineWithin: the envelope goes in one write, after the final reply to the message before it.
	PipelineWithin
	// PipelineOff: each command waits for the reply to the one before it.
	PipelineOff
)

// Timeouts bound the steps of a dialogue. 0 means the default given, [NoLimit] means none. The defaults that RFC 5321,
// 4.5.3.2 gives are long on purpose: a time-out at the final reply leaves a message of which nobody knows whether it was
// accepted. The context of a Send bounds it as a whole.
type Timeouts struct {
	_ [0]func() // not comparable, so that it may grow

	Outage     time.Duration // how long a Send waits while nothing gets through: no connection can be had, and none works: 2 min
	Dial       time.Duration // TCP connect: 30 s
	Greeting   time.Duration // the greeting, and each reply until the connection is ready if Command is not less: 30 s
	TLS        time.Duration // the TLS handshake: 30 s
	Command    time.Duration // the reply to EHLO, STARTTLS, AUTH, MAIL, RCPT, RSET: 5 min
	Data       time.Duration // the reply to DATA: 2 min
	Write      time.Duration // writing to a relay that takes nothing, or on average less than 8 octets a second: 3 min
	FinalReply time.Duration // the reply to the final dot: 10 min
	Drain      time.Duration // the reply to the final dot once the Send's context has ended: 2 s; negative: as long as FinalReply
	Overlap    time.Duration // the first reply to what was written behind a final dot, once that has its own: 5 s
	Quit       time.Duration // the relay's close, half of it after QUIT and half after FIN: 5 s; not negative
}

// Result is the outcome of one message of [Client.SendAll].
type Result struct {
	Message Message // as it was given, with its Tag
	Receipt Receipt
	Err     error // nil or an *Error, as from Send
}

// Client is a pool of connections to one relay. Make one with [New] and share it: it is safe for concurrent use.
type Client struct {
	cfg  *settings
	pool *pool
}

// String says which relay the Client is for.
func (c *Client) String() string {
	if c.cfg.Name != "" {
		return fmt.Sprintf("smtprelay.Client(%q, %s)", c.cfg.Name, c.cfg.Addr)
	}
	return "smtprelay.Client(" + c.cfg.Addr + ")"
}

// New returns a Client for the relay that cfg describes. It checks everything and reports all mistakes in one *[Error]; it
// dials nothing (see [Client.Ping]) and starts no goroutine.
func New(cfg Config) (*Client, error) {
	checked, err := cfg.check()
	if err != nil {
		return nil, &Error{Op: OpConfig, Outcome: NotAccepted, Scope: ScopeCaller, Err: err, permanent: true}
	}
	return &Client{cfg: checked, pool: newPool(checked)}, nil
}

// Send delivers m to the relay and returns its receipt. It waits, first come first served, for a connection; ctx bounds the
// whole call, but for the time that the caller's own code takes: a Body that is blocked in its WriteTo or Read is waited for, as are
// Config.Auth and Config.Dial by whoever needs the connection. Let them end with ctx too.
//
// A ctx that ends once the end of the message has left is not the end of the call: the relay's answer is awaited for
// Timeouts.Drain, so that the message is not of unknown fate for want of a moment. Send is blocked, whatever ctx, while m.Body
// writes itself.
//
// A nil error means that the message was accepted for every recipient. Otherwise the error is an *[Error], and [ShouldRetry] and
// [RetryTo] tell whether and to whom m should be sent again. Receipt and error both tell of each recipient.
func (c *Client) Send(ctx context.Context, m Message) (Receipt, error) {
	return c.send(ctx, m, ask{})
}

func (c *Client) send(ctx context.Context, m Message, want ask) (Receipt, error) {
	began := time.Now()
	if t := c.cfg.Trace; t != nil && t.SendStart != nil {
		ctx = startSend(ctx, t.SendStart, SendStartInfo{Name: c.cfg.Name, Addr: c.cfg.Addr, Message: m})
	}
	d := delivery{c: c, ctx: ctx, m: m, want: want}
	receipt, err := d.run()
	c.cfg.stats.count(err)
	if t := c.cfg.Trace; t != nil && t.SendDone != nil {
		t.SendDone(ctx, SendDoneInfo{Name: c.cfg.Name, Addr: c.cfg.Addr, Message: m, Receipt: receipt, Err: err, Took: time.Since(began)})
	}
	return receipt, err
}

// SendAll sends the messages of ms, as many at a time as the connections can carry, and yields a Result for each in the
// order of completion. It takes no more messages from ms than it can send. When ctx ends or the Client is closed, it takes no
// further message and yields what became of those under way; when the loop over the results ends early, those under way are
// finished first. A ctx or a Client that has ended may mean that there is no Result at all.
//
// ms runs in a goroutine of its own, and is not waited for: one that is blocked when SendAll comes to its end, as a reader of a
// channel may be, goes on in the background up to its next message. That one is not sent and has no Result, and the yield of ms
// returns false.
func (c *Client) SendAll(ctx context.Context, ms iter.Seq[Message]) iter.Seq[Result] {
	return func(yield func(Result) bool) {
		// As many as can be on their way, and two more for each connection to be there when it is their turn.
		limits := c.cfg.Limits
		senders := semaphore.NewWeighted(int64(limits.MaxConns * (2 + max(2, c.cfg.MaxInFlight))))
		results := make(chan Result)
		enough := make(chan struct{})
		left := make(chan struct{}) // ms has come to its end

		var mu sync.Mutex // guards the three below
		under := 0        // messages that were taken and have no Result yet
		stopped := false  // no more are waited for
		over := false     // results is closed
		// count notes so many messages more or less under way, and whether more are waited for. It reports false if it is too late.
		count := func(more int, stop bool) bool {
			mu.Lock()
			defer mu.Unlock()
			if over {
				return false
			}
			under += more
			stopped = stopped || stop
			if over = stopped && under == 0; over {
				close(results)
			}
			return true
		}
		send := func(m Message) {
			results <- c.result(ctx, m)
			count(-1, false)
		}
		go func() {
			defer close(left)
			for m := range ms {
				if !count(1, false) {
					return
				}
				if senders.Acquire(ctx, 1) != nil {
					go send(m) // it was taken, so it has a result, which Send will tell at once
					return
				}
				select {
				case <-enough:
					count(-1, false)
					return
				default:
				}
				go func() {
					send(m)
					senders.Release(1) // not before: who is slow with the results slows the sending
				}()
				if ctx.Err() != nil {
					return
				}
			}
		}()
		go func() {
			select {
			case <-left:
			case <-enough:
			case <-ctx.Done():
			case <-c.pool.ending:
			}
			count(0, true)
		}()
		defer func() { // also if the loop is left by a panic
			close(enough)
			for range results {
			}
		}()
		for r := range results {
			if !yield(r) {
				return
			}
		}
	}
}

func (c *Client) result(ctx context.Context, m Message) Result {
	receipt, err := c.send(ctx, m, ask{patient: true})
	return Result{Message: m, Receipt: receipt, Err: err}
}

// SendMail has the shape of net/smtp's function: it sends msg to all of to or, if the relay refuses one of them, to
// nobody. The null reverse-path is [NullSender], and not "" as there.
func (c *Client) SendMail(from string, to []string, msg []byte) error {
	_, err := c.Send(context.Background(), Message{From: from, To: to, Body: Bytes(msg), AllOrNothing: true})
	return err
}

// Ping tells whether the Client can send: it is what a readiness probe asks, as often as it likes.
//
// It returns nil at once where a connection is open on which the relay has answered, or taken a large part of a body, within the last
// half minute, however many Sends wait. Else it takes a connection, opens one if need be, and authenticates; an idle one costs no
// traffic. It does not wait for a relay that cannot be reached: the error of the last attempt to connect is returned, as with
// Message.FailFast. A wrong key is tried once, where the first Sends of a Client, made at once, may each try it on a connection of
// their own.
//
// ctx bounds the call, but for a Config.Auth or Config.Dial that does not heed it. Without a time limit in ctx, a relay that accepts
// connections and then says nothing is waited for as long as Timeouts and Retry say: minutes. The error is an *[Error].
func (c *Client) Ping(ctx context.Context) error {
	if err := c.pool.enter(); err != nil {
		return err
	}
	defer c.pool.leave()
	if ctx.Err() == nil && c.pool.workedSince(time.Now().Add(-pingTrust)) {
		return nil
	}
	for attempts := 0; ; {
		g, err := c.pool.take(ctx, ask{failFast: true})
		attempts += g.failed
		s := g.session
		if err == nil {
			err = c.pool.authenticate(ctx, s)
			c.pool.release(s)
		}
		if err == nil {
			return nil
		}
		if s != nil {
			attempts++
		}
		if s == nil || err.lasting() || ctx.Err() != nil || c.cfg.Retry.exhausted(attempts) {
			err.Attempts = max(attempts, 1)
			return err
		}
	}
}

// pingTrust is for how long a connection that has worked proves to Ping that the Client can send.
const pingTrust = 30 * time.Second

// Stats returns a snapshot of the Client's counters.
func (c *Client) Stats() Stats { return c.pool.stats() }

// Shutdown ends the Client gracefully: calls that have begun are finished, those that wait for a connection included; later
// ones fail with ErrClosed; then the connections end with QUIT. When ctx ends first, the rest is closed as by Close, and the
// context's error is returned.
func (c *Client) Shutdown(ctx context.Context) error {
	err := c.pool.shutdown(ctx)
	c.cfg.profile.told()
	return err
}

// Close ends the Client at once: Sends under way fail, with Outcome Unknown if their final dot has left; connections are
// closed, the idle ones with QUIT. It returns nil, when no goroutine of the Client is left. Calling it again, or after
// Shutdown, does nothing.
func (c *Client) Close() error {
	c.pool.shut()
	c.cfg.profile.told()
	return nil
}

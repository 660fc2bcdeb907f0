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

// Config says which relay a [Client] talks to, and how. New copies it: changing it later has no effect. A Config with nothing but a
// SendGrid API key as its Password is a client of SendGrid. Printing it, with any verb, as JSON or through log/slog, shows no secret.
type Config struct {
	// Name is a label for this Client: it is in [Stats], in every Info of a [Trace] and in each line of [LogTrace], and is part of
	// the key by which a [Registry] finds Clients. It may be empty. It is not treated as a secret.
	Name string

	// Addr is the relay's "host:port". The TLS certificate is verified for its host. Empty means "smtp.sendgrid.net:587"; a
	// Password that is not a SendGrid API key ("SG.…") is then an error of New, since it belongs to another relay.
	//
	// Without Dial, a host with several addresses is tried address by address within one dial, in the resolver's order (RFC 6724),
	// until one gets as far as AUTH; at most three that accept TCP are tried. While there are others, one address has a tenth of
	// Timeouts.Dial for TCP, and a third of Timeouts.Greeting and TLS for each later step. An address that failed is tried last for
	// 30 seconds, doubling to 10 minutes, until it works.
	Addr string

	// Username is the user name for AUTH. It may be empty where there is no Password, and for SendGrid's hosts, where it means "apikey".
	Username string

	// Password is the password or API key. Without Username, Password and Auth the Client does not authenticate, which relays on a
	// local network may allow.
	//
	// Once the relay has refused the credentials the Client opens no connection for 30 seconds, since some relays lock an account
	// after a few failures. The pause doubles with each further refusal, up to 5 minutes. Meanwhile a Send that needs a new
	// connection fails at once with the relay's reply.
	Password string

	// Auth, if not nil, replaces Username and Password. It is called once per connection, after EHLO, and returns the mechanism to
	// use, one of those that the relay offers: for SCRAM, XOAUTH2 or OAUTHBEARER, or for PLAIN with a key that changes. A nil
	// Mechanism means no authentication. An error counts as a connection that could not be opened: the Client retries later.
	// Without Auth the Client uses AUTH PLAIN (RFC 4616), or LOGIN where PLAIN is not offered or is answered with 502 or 504.
	//
	// Auth may be called from several goroutines at once. ctx is cancelled by Close, not by the Send that needs the connection. Set
	// your own timeout for token requests.
	Auth func(ctx context.Context, s ServerInfo) (Mechanism, error)

	// TLS says how the connection is protected. The zero value, [TLSByPort], is right for all well-known relays.
	TLS TLSMode

	// AllowInsecureAuth lets credentials cross a connection without TLS to another machine; TLS must allow such a connection too.
	// Without it, credentials cross a clear connection only if the host of Addr is localhost or a loopback address and the connection
	// leads there. Otherwise the connection fails: the Client never goes on without authentication instead.
	AllowInsecureAuth bool

	// TLSConfig is cloned; nil means a default one. Where they are not set, ServerName becomes the host of Addr, MinVersion
	// becomes TLS 1.2, and ClientSessionCache becomes a cache of this Client's own.
	TLSConfig *tls.Config

	// LocalName is the argument of EHLO: this host's name, or an address literal such as "[192.0.2.1]" or "[IPv6:2001:db8::1]"
	// (RFC 5321, 4.1.3). Empty means the fully qualified name of this host if it has one, else the address literal of the connection,
	// and never "localhost" to another machine. A name with an underscore and an address without brackets are errors of [New], since
	// relays refuse them.
	LocalName string

	Limits   Limits
	Retry    Retry
	Timeouts Timeouts

	// Pipelining says how far commands run ahead of replies where the relay offers PIPELINING (RFC 2920). The zero value,
	// [PipelineAuto], is the fastest.
	Pipelining Pipelining

	// Chunking sends bodies in chunks (BDAT, RFC 3030) to a relay that offers CHUNKING and PIPELINING. Envelope and body then leave
	// in one write, and up to MaxInFlight messages are written without waiting for a reply. The default is off: relays that carry
	// volume do not offer it (SendGrid, Mailgun, SES); Postfix, Exim, Gmail and Microsoft 365 do.
	//
	// Some messages still go by DATA. The Client tests each address of the relay, at most once an hour, with a chunk that is out of
	// order: an address that does not discard a refused chunk gets bodies by DATA. So do connections from Dial that have no
	// RemoteAddr, and bodies that begin with white space or with the "From " line of a mailbox file. On each connection, messages
	// follow one another without a reply only after the relay has answered an envelope that arrived together with the end of a message.
	// All relays behind one proxy or load balancer count as one relay.
	//
	// The risk that remains: a relay that passed the test may behave otherwise later. If it silently discards a message that followed
	// another, or answers an envelope command twice, the reply to one command can be taken for the reply to another. DATA does not
	// have this risk, since its reply, 354, cannot be mistaken for another.
	Chunking bool

	// MaxInFlight is how many messages may be written on one connection before the first of them has its final reply. It applies
	// where bodies go in chunks: see Chunking. A larger number hides a longer round trip, but when the connection is lost the
	// outcome of each of these messages is [Unknown]. 0 means 4. The range is 1 to 1,000.
	MaxInFlight int

	// Dial opens the network connection; nil means net.Dialer.DialContext to each of the host's addresses in turn. It may be
	// called from several goroutines at once. ctx ends after Timeouts.Dial. The Client adds TLS on top. The connection must support
	// deadlines; a connection through SSH does not. If it has a CloseWrite method, as *net.TCPConn has, the Client uses it to
	// wait for the relay's close.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)

	// Trace, if not nil, has functions that are called when something happens: see [LogTrace] for logging.
	Trace *Trace
}

// ServerInfo tells [Config.Auth] about the relay.
type ServerInfo struct {
	Name       string               // the host of Config.Addr
	Mechanisms []string             // the mechanisms that the relay offers, in its order, in upper case
	TLS        *tls.ConnectionState // nil on a connection without TLS
}

// Mechanism is the client's side of a SASL mechanism (RFC 4422), for one authentication. Every sasl.Client of
// github.com/emersion/go-sasl is one. Its methods are called from one goroutine at a time.
type Mechanism interface {
	// Start returns the name of the mechanism, which the relay must offer, and the initial response before base64. A nil ir means
	// no initial response; an empty one is sent as "=" (RFC 4954, 4). An error ends the connection.
	Start() (mech string, ir []byte, err error)

	// Next returns the response to a challenge, both before base64. On an error the Client cancels the exchange ("*", RFC 4954, 4)
	// and ends the connection.
	Next(challenge []byte) (response []byte, err error)
}

// Pipelining says how far commands run ahead of replies.
type Pipelining int

const (
	// PipelineAuto writes the envelope in one write, and on a busy connection without waiting for the final reply to the previous
	// message: one round trip per message. If the relay turns out not to support that, the Client stops doing it for that relay.
	PipelineAuto Pipelining = iota
	// PipelineWithin writes the envelope in one write, after the final reply to the previous message.
	PipelineWithin
	// PipelineOff waits for the reply to each command before it writes the next.
	PipelineOff
)

// Timeouts bound each step of a dialogue. In each field 0 means the default below and [NoLimit] means no limit, unless the field says
// otherwise. The long defaults are those of RFC 5321, 4.5.3.2: a timeout while waiting for the final reply leaves a message whose
// outcome is [Unknown]. The context bounds a Send as a whole.
type Timeouts struct {
	_ [0]func() // not comparable, so that it may grow

	Outage     time.Duration // for a Send to wait while nothing gets through: no connection can be opened, none works, or a new one gets no reply to MAIL. Default 2 min
	Dial       time.Duration // for the TCP connection, name look-up included, all addresses together. Default 30 s
	Greeting   time.Duration // for the greeting; the smaller of this and Command for each later reply until the connection is ready. Default 30 s
	TLS        time.Duration // for the TLS handshake. Default 30 s
	Command    time.Duration // for the reply to EHLO, STARTTLS, AUTH, MAIL, RCPT or RSET. Default 5 min
	Data       time.Duration // for the reply to DATA. Default 2 min
	Write      time.Duration // for a write to a relay that reads nothing, or less than 8 bytes a second on average; up to a sixtieth less. Default 3 min
	FinalReply time.Duration // for the reply to the end of the message. Default 10 min

	// Unacked is for the relay's kernel to acknowledge what was sent (TCP_USER_TIMEOUT, Linux only). Default 1 min. It notices a path
	// that was cut; a relay that processes a message for ten minutes still acknowledges. It is lifted while more than 16 KiB are
	// unanswered, since Linux would also abort a connection whose receive window is full. It needs a *net.TCPConn or another
	// connection with SyscallConn; see [DialControl].
	Unacked time.Duration

	Drain   time.Duration // for the reply to the end of the message once the Send's context has ended. Default 2 s; NoLimit: as long as FinalReply
	Overlap time.Duration // for the first reply to an envelope written ahead, after the final reply to the previous message. Default 5 s
	Quit    time.Duration // for the relay to close: half after QUIT, half after the Client's FIN. Default 5 s; must not be negative
}

// Result is the result of one message of [Client.SendAll].
type Result struct {
	Message Message // the message as passed to SendAll, with its Tag
	Receipt Receipt // as Send returns it
	Err     error   // nil or an *Error, as Send returns it
}

// Client is a pool of connections to one relay. Make one with [New]. All its methods are safe for concurrent use: a program needs one
// Client per relay. End it with [Client.Shutdown] or [Client.Close], or its connections stay open until they are idle for too long.
type Client struct {
	cfg  *settings
	pool *pool
}

// String returns the Client's Name and address, without a secret.
func (c *Client) String() string {
	if c.cfg.Name != "" {
		return fmt.Sprintf("smtprelay.Client(%q, %s)", c.cfg.Name, c.cfg.Addr)
	}
	return "smtprelay.Client(" + c.cfg.Addr + ")"
}

// New returns a Client for the relay that cfg describes. It checks every field of cfg and reports all mistakes in one *[Error] with
// [OpConfig]. It does not connect: [Client.Ping] does. It starts no goroutine.
func New(cfg Config) (*Client, error) {
	checked, err := cfg.check()
	if err != nil {
		return nil, &Error{Op: OpConfig, Outcome: NotAccepted, Scope: ScopeCaller, Err: err, permanent: true}
	}
	return &Client{cfg: checked, pool: newPool(checked)}, nil
}

// Send delivers m to the relay and returns the relay's receipt. It waits for a connection, first come first served
// (Message.Urgent goes first), and makes as many attempts as [Retry] allows.
//
// ctx bounds the call, with two exceptions. If ctx ends after the end of the message was sent, Send waits up to Timeouts.Drain (2 s) for
// the relay's reply, since otherwise the outcome would be unknown. And Send does not return while m.Body is in its WriteTo or
// Read: let the Body end with ctx too. If ctx ends before the end of the message was sent, nothing is accepted.
//
// A nil error means that the relay has accepted the message for every recipient. Otherwise the error is an *[Error]: [ShouldRetry]
// tells whether to send m again, and [RetryTo] to whom. The Receipt and the error both list every recipient. Send does not change m.
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

// SendAll sends the messages of ms, as many at a time as the connections can carry, and yields a Result for each in order of completion.
// Put a key into Message.Tag to know which Result is whose. SendAll takes only as many messages from ms as it can send, so that ms may
// be endless. The loop over the results need not be fast: a slow one slows the sending down.
//
// When ctx ends or the Client is closed, SendAll takes no further message and yields the Results of those it has taken. As with Send,
// a message whose end was sent is waited for up to Timeouts.Drain, and what was not sent is [NotAccepted]: ShouldRetry is true for it.
// When the loop over the results ends early, SendAll first finishes the messages it has taken; their Results are lost. If ctx has ended
// or the Client is closed at the start there may be no Result at all.
//
// ms runs in its own goroutine, so that variables it shares with the loop need a lock or a channel. SendAll does not wait for ms to
// return: if ms is blocked when SendAll ends, say on a channel, it goes on in the background until its next message. That message is
// not sent and has no Result, and yield returns false.
func (c *Client) SendAll(ctx context.Context, ms iter.Seq[Message]) iter.Seq[Result] {
	return func(yield func(Result) bool) {
		// Enough senders for all messages that can be in flight, and two more per connection that wait for their turn.
		limits := c.cfg.Limits
		senders := semaphore.NewWeighted(int64(limits.MaxConns * (2 + max(2, c.cfg.MaxInFlight))))
		results := make(chan Result)
		enough := make(chan struct{})
		left := make(chan struct{}) // closed when ms has ended

		var mu sync.Mutex // guards under, stopped and over
		under := 0        // messages taken from ms that have no Result yet
		stopped := false  // no further message is taken
		over := false     // results is closed
		// count adds more to under, and sets stopped if stop is set. It returns false if results is closed already.
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
					go send(m) // m was taken, so it needs a Result; ctx has ended, so Send fails at once
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
					senders.Release(1) // after send, so that slow reading of the results slows down the sending
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
		defer func() { // deferred, so that it also runs if yield panics
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

// SendMail has the signature of net/smtp's function without its first two arguments. It sends msg to all of to or, if the relay refuses
// one of them, to none. It has no context: Timeouts bound it. The empty envelope sender is [NullSender], and not "" as in net/smtp.
// The error is an *[Error]. msg must not change until SendMail has returned.
func (c *Client) SendMail(from string, to []string, msg []byte) error {
	_, err := c.Send(context.Background(), Message{From: from, To: to, Body: Bytes(msg), AllOrNothing: true})
	return err
}

// Ping reports whether the Client can send. A readiness probe may call it as often as it likes.
//
// It returns nil at once if the relay has replied, or read a large part of a body, on an open connection within the last 30
// seconds, however many Sends wait. Otherwise it takes a connection, opens one if there is none, and authenticates. An idle
// connection costs no traffic. Ping does not wait for a relay that cannot be reached: it returns the error of the last attempt
// to connect, as with Message.FailFast. Ping tries wrong credentials once, whereas the first concurrent Sends of a Client may
// each try them on a connection of their own.
//
// ctx bounds the call, unless a Config.Auth or Config.Dial ignores it. Without a deadline in ctx, Ping may wait minutes for a relay
// that accepts connections and then does not reply: as long as Timeouts and Retry allow. The error is an *[Error].
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

// pingTrust is how recently a connection must have worked for Ping to return nil at once.
const pingTrust = 30 * time.Second

// Stats returns a snapshot of the Client's counters. It is cheap enough to be called for every scrape of metrics.
func (c *Client) Stats() Stats { return c.pool.stats() }

// Shutdown ends the Client gracefully. Calls that began before it are finished, those that wait for a connection included; later calls
// fail with [ErrClosed], for which [ShouldRetry] is true. Then the connections are closed with QUIT. If ctx ends first, Shutdown closes
// what is left as [Client.Close] does, and returns the error of ctx. Otherwise it returns nil. Calling it again, or after Close, waits
// for the same end.
func (c *Client) Shutdown(ctx context.Context) error {
	err := c.pool.shutdown(ctx)
	c.cfg.profile.told()
	return err
}

// Close ends the Client at once, and returns when none of its goroutines is left. Sends in progress fail: with [Unknown] if the
// end of their message was sent, else with [NotAccepted]. Idle connections are closed with QUIT, all others at once. Close waits
// for the caller's code to return: a Body in WriteTo, Config.Dial, Config.Auth. It always returns nil. Calling it again, or
// after Shutdown, does nothing.
func (c *Client) Close() error {
	c.pool.shut()
	c.cfg.profile.told()
	return nil
}

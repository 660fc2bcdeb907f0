package smtprelay

import (
	"context"
	"crypto/tls"
	"log/slog"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// Trace is a set of functions that are told what a Client does, in the manner of net/http/httptrace. Any may be nil. They
// are called from many goroutines at once and must return quickly. The context is that of the Send the event belongs to,
// or carries the values of the one that opened the connection, or is the background context. No function is given a secret
// or any part of a message.
type Trace struct {
	// DialStart: a connection is about to be opened.
	DialStart func(ctx context.Context, addr string)

	// DialDone: it is ready for its first message, or failed.
	DialDone func(ctx context.Context, d DialInfo)

	// GotConn: a Send has a connection to write on.
	GotConn func(ctx context.Context, g GotConnInfo)

	// Command: a command was written to the connection's buffer. Arguments of AUTH are replaced by "[redacted]"; the end
	// of a message is told as ".".
	Command func(ctx context.Context, conn int64, line string)

	// Reply: the relay has answered the oldest command that had no answer.
	Reply func(ctx context.Context, conn int64, op Op, r Reply)

	// Retry: a Send has failed without being accepted and is about to be tried again after wait. attempt counts what
	// Error.Attempts counts; it does not grow, and wait is 0, where only the connection was at fault and the message goes to
	// another one at once. DialDone tells of connections that could not be opened.
	Retry func(ctx context.Context, attempt int, wait time.Duration, err error)

	// SendDone: a Send is about to return.
	SendDone func(ctx context.Context, r Result, took time.Duration)

	// ConnClosed: a connection is closed and its place is free.
	ConnClosed func(ctx context.Context, c CloseInfo)
}

// DialInfo tells how the opening of a connection ended.
type DialInfo struct {
	Conn       int64 // counts the Client's connections from 1
	Addr       string
	TLSVersion uint16   // of crypto/tls; 0 means in the clear
	Resumed    bool     // the TLS session was resumed
	Extensions []string // the EHLO keywords in force
	Took       time.Duration
	Err        error // why it is not open, an *Error; nil if it is
}

// GotConnInfo describes the connection a Send has got.
type GotConnInfo struct {
	Conn       int64
	Messages   int  // transactions that were begun on it before
	Overlapped bool // the final reply of the one before is outstanding
	Waited     time.Duration
}

// CloseInfo tells why a connection was closed.
type CloseInfo struct {
	Conn     int64
	Messages int    // transactions begun on it
	Reason   string // "full", "age", "idle", "closed", or "fault"
	Err      error  // the fault; nil if there was none
}

// LogTrace returns a Trace that logs to l: what goes wrong at warning level, each message and connection at info level, and
// each command and reply at debug level. No secret and no part of a message is logged; addresses of the envelope are. What a
// relay or a user wrote is logged on one line of printable characters.
func LogTrace(l *slog.Logger) *Trace {
	return &Trace{
		DialDone: func(ctx context.Context, d DialInfo) {
			if d.Err != nil {
				l.WarnContext(ctx, "smtp connection failed", "addr", d.Addr, "took", d.Took, "err", d.Err)
				return
			}
			l.InfoContext(ctx, "smtp connection open", "conn", d.Conn, "addr", d.Addr, "tls", tlsName(d.TLSVersion),
				"resumed", d.Resumed, "extensions", printable.Lines(d.Extensions), "took", d.Took)
		},
		GotConn: func(ctx context.Context, g GotConnInfo) {
			l.DebugContext(ctx, "smtp connection taken", "conn", g.Conn, "messages", g.Messages, "overlapped", g.Overlapped, "waited", g.Waited)
		},
		Command: func(ctx context.Context, conn int64, line string) {
			l.DebugContext(ctx, "smtp command", "conn", conn, "line", printable.Line(line))
		},
		Reply: func(ctx context.Context, conn int64, op Op, r Reply) {
			l.DebugContext(ctx, "smtp reply", "conn", conn, "to", string(op), "reply", r.String())
		},
		Retry: func(ctx context.Context, attempt int, wait time.Duration, err error) {
			l.WarnContext(ctx, "smtp message is tried again", "attempt", attempt, "wait", wait, "err", err)
		},
		SendDone: func(ctx context.Context, r Result, took time.Duration) {
			if r.Err != nil {
				l.WarnContext(ctx, "smtp message failed", "from", printable.Line(r.Message.From), "to", printable.Lines(r.Message.To), "took", took, "err", r.Err)
				return
			}
			l.InfoContext(ctx, "smtp message accepted", "from", printable.Line(r.Message.From), "to", printable.Lines(r.Message.To),
				"queue_id", printable.Line(r.Receipt.QueueID), "took", took)
		},
		ConnClosed: func(ctx context.Context, c CloseInfo) {
			l.InfoContext(ctx, "smtp connection closed", "conn", c.Conn, "messages", c.Messages, "reason", c.Reason, "err", c.Err)
		},
	}
}

func tlsName(version uint16) string {
	if version == 0 {
		return "none"
	}
	return tls.VersionName(version)
}

func (p *pool) traceGot(ctx context.Context, s *session, waited time.Duration) {
	t := p.cfg.Trace
	if t == nil || t.GotConn == nil {
		return
	}
	i := s.Info()
	info := GotConnInfo{Conn: s.id, Messages: i.Used, Overlapped: i.Pending > 0, Waited: waited}
	t.GotConn(ctx, info)
}

func (p *pool) traceClosed(s *session, i conn.Info) {
	p.cfg.stats.countClose(i.Reason)
	t := p.cfg.Trace
	if t == nil || t.ConnClosed == nil {
		return
	}
	info := CloseInfo{Conn: s.id, Messages: i.Used, Reason: string(i.Reason), Err: i.Err}
	if refused, ok := i.Err.(*conn.AuthError); ok {
		info.Err = p.cfg.refusedAuth(refused.Reply)
	}
	t.ConnClosed(context.Background(), info)
}

// connTrace is what the connection id tells the Trace.
func (c *settings) connTrace(id int64) (trace conn.Trace) {
	t := c.Trace
	if t == nil {
		return trace
	}
	if t.Command != nil {
		trace.Command = func(ctx context.Context, line string) { t.Command(ctx, id, line) }
	}
	if t.Reply != nil {
		trace.Reply = func(ctx context.Context, to conn.Step, r wire.Reply) { t.Reply(ctx, id, opOf(to), publicReply(r)) }
	}
	return trace
}

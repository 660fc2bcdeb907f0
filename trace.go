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

// Trace is a set of functions that are told what a Client does, in the manner of net/http/httptrace. Any may be nil; see
// [MultiTrace] for several. They are called from many goroutines at once and must return quickly; none may call Shutdown or
// Close of its Client. No function is given a secret or any part of a message but its envelope, except that the Message of
// SendStart, SendDone and Retry is the caller's own, with its Body.
//
// The context is the one that SendStart returned for the Send that the event belongs to. For a connection being opened it has
// the values of the Send that the connection was begun for, and does not end with it. Where there is no such Send it is the
// background context.
type Trace struct {
	// SendStart: Send was called. What it returns is the context of the whole Send from then on and is what the other hooks are
	// given, so that a span begun here is the parent of theirs. It should be made from ctx; nil means ctx.
	SendStart func(ctx context.Context, info SendStartInfo) context.Context

	// SendDone: the Send that SendStart has told of is about to return.
	SendDone func(ctx context.Context, info SendDoneInfo)

	// DialStart: a connection is about to be opened.
	DialStart func(ctx context.Context, info DialStartInfo)

	// DialDone: it is ready for its first message, or failed.
	DialDone func(ctx context.Context, info DialDoneInfo)

	// GotConn: a Send has a connection to write on.
	GotConn func(ctx context.Context, info GotConnInfo)

	// Command: a command was written to the connection's buffer.
	Command func(ctx context.Context, info CommandInfo)

	// Reply: the relay has answered the oldest command that had no answer.
	Reply func(ctx context.Context, info ReplyInfo)

	// Retry: a Send has failed without being accepted and is about to be tried again. DialDone tells of connections that could
	// not be opened.
	Retry func(ctx context.Context, info RetryInfo)

	// ConnClosed: a connection is closed and its place is free.
	ConnClosed func(ctx context.Context, info ConnClosedInfo)

	// Learned: the Client has learnt something about its relay and acts on it from now on. Lessons are told one at a time, in
	// their order; where the hook is 256 behind, the next ones are not told.
	Learned func(ctx context.Context, info LearnedInfo)
}

// SendStartInfo tells of a Send that begins.
type SendStartInfo struct {
	Name    string // Config.Name
	Addr    string // Config.Addr
	Message Message
}

// SendDoneInfo tells how a Send has ended.
type SendDoneInfo struct {
	Name    string // Config.Name
	Addr    string // Config.Addr
	Message Message
	Receipt Receipt
	Err     error // nil or an *Error, as from Send
	Took    time.Duration
}

// DialStartInfo tells of a connection that is about to be opened.
type DialStartInfo struct {
	Name string // Config.Name
	Addr string // Config.Addr
	Conn int64  // counts the Client's connections from 1
}

// DialDoneInfo tells how the opening of a connection has ended.
type DialDoneInfo struct {
	Name       string   // Config.Name
	Addr       string   // Config.Addr
	Conn       int64    // as in DialStartInfo
	TLSVersion uint16   // of crypto/tls; 0 means in the clear
	Resumed    bool     // the TLS session was resumed
	Extensions []string // the EHLO keywords in force
	Took       time.Duration
	Err        error // why it is not open, an *Error; nil if it is
}

// GotConnInfo describes the connection a Send has got.
type GotConnInfo struct {
	Name       string // Config.Name
	Addr       string // Config.Addr
	Conn       int64  // as in DialStartInfo
	Messages   int    // transactions that were begun on it before
	Overlapped bool   // the final reply of the one before is outstanding
	Waited     time.Duration
}

// CommandInfo tells of a command.
type CommandInfo struct {
	Name string // Config.Name
	Addr string // Config.Addr
	Conn int64  // as in DialStartInfo
	Op   Op
	Line string // without its line end; arguments of AUTH are "[redacted]", and the end of a message by DATA is "."
}

// ReplyInfo tells of a reply.
type ReplyInfo struct {
	Name  string // Config.Name
	Addr  string // Config.Addr
	Conn  int64  // as in DialStartInfo
	Op    Op     // what it answers; empty where nothing was asked
	Reply Reply
}

// RetryInfo tells why a message is tried again, and when.
type RetryInfo struct {
	Name    string // Config.Name
	Addr    string // Config.Addr
	Message Message
	Err     error // an *Error

	// Attempt counts what Error.Attempts counts. It does not grow, and Wait is 0, where only the connection was at fault and the
	// message goes to another one at once.
	Attempt int
	Wait    time.Duration // until then
}

// ConnClosedInfo tells why a connection was closed.
type ConnClosedInfo struct {
	Name     string // Config.Name
	Addr     string // Config.Addr
	Conn     int64  // as in DialStartInfo
	Messages int    // transactions begun on it
	Reason   string // "full", "age", "idle", "closed", "shared" (others wanted its place of Limits.Slots), or "fault"
	Err      error  // the fault; nil if there was none
}

// LearnedInfo is something that a Client has learnt about its relay.
type LearnedInfo struct {
	Name   string // Config.Name
	Addr   string // Config.Addr
	Lesson Lesson
	Limit  int    // the number learnt, where the lesson is one; 0 means that there is none any more
	Text   string // for people
	Reply  Reply  // that has taught it; Code 0: it was not one reply
}

// Lesson is one short word for what a Client has learnt, made for the labels of metrics.
type Lesson string

const (
	LessonNoOverlap      Lesson = "no_overlap"      // nothing is written behind a final dot any more
	LessonNoRset         Lesson = "no_rset"         // EHLO takes the place of RSET
	LessonPace           Lesson = "pace"            // messages are begun at a pace; Limit is how many a second, at least 1
	LessonAuthAlone      Lesson = "auth_alone"      // no commands follow AUTH in one write any more
	LessonMaxMessages    Lesson = "max_messages"    // Limit: messages on a connection
	LessonMaxRecipients  Lesson = "max_recipients"  // Limit: recipients in a transaction
	LessonMaxConns       Lesson = "max_conns"       // Limit: connections, for a while
	LessonBadCredentials Lesson = "bad_credentials" // these credentials are not tried for a while
	LessonChunks         Lesson = "chunks"          // bodies may go in chunks to one address of the relay
	LessonNoChunks       Lesson = "no_chunks"       // bodies go by DATA to one address of the relay
)

// MultiTrace returns a Trace that tells all of traces, in their order; nil ones are left out. Each SendStart is given the context
// that the one before has returned.
func MultiTrace(traces ...*Trace) *Trace {
	all := new(Trace)
	for _, t := range traces {
		if t == nil {
			continue
		}
		if first, second := all.SendStart, t.SendStart; first == nil {
			all.SendStart = second
		} else if second != nil {
			all.SendStart = func(ctx context.Context, info SendStartInfo) context.Context {
				return startSend(startSend(ctx, first, info), second, info)
			}
		}
		all.SendDone = both(all.SendDone, t.SendDone)
		all.DialStart = both(all.DialStart, t.DialStart)
		all.DialDone = both(all.DialDone, t.DialDone)
		all.GotConn = both(all.GotConn, t.GotConn)
		all.Command = both(all.Command, t.Command)
		all.Reply = both(all.Reply, t.Reply)
		all.Retry = both(all.Retry, t.Retry)
		all.ConnClosed = both(all.ConnClosed, t.ConnClosed)
		all.Learned = both(all.Learned, t.Learned)
	}
	return all
}

func both[Info any](first, second func(context.Context, Info)) func(context.Context, Info) {
	switch {
	case first == nil:
		return second
	case second == nil:
		return first
	}
	return func(ctx context.Context, info Info) {
		first(ctx, info)
		second(ctx, info)
	}
}

// startSend returns the context of a Send that begins.
func startSend(ctx context.Context, hook func(context.Context, SendStartInfo) context.Context, info SendStartInfo) context.Context {
	if started := hook(ctx, info); started != nil {
		return started
	}
	return ctx
}

// LogTrace returns a Trace that logs to l: what goes wrong at warning level, each message, connection and lesson at info level,
// and each command and reply at debug level. An error is logged as its text ("err"), with its "step", "outcome", "scope", "code"
// and "attempts" beside. Config.Name, where it is set, is the attribute "relay". No secret and no part of a message is logged;
// addresses of the envelope are. What a relay or a user wrote is logged on one line of printable characters.
func LogTrace(l *slog.Logger) *Trace {
	log := func(ctx context.Context, level slog.Level, msg, name string, attrs ...slog.Attr) {
		if name != "" {
			attrs = append(attrs, slog.String("relay", printable.Line(name)))
		}
		l.LogAttrs(ctx, level, msg, attrs...)
	}
	return &Trace{
		DialDone: func(ctx context.Context, d DialDoneInfo) {
			where := []slog.Attr{slog.Int64("conn", d.Conn), slog.String("addr", d.Addr), slog.Duration("took", d.Took)}
			if d.Err != nil {
				log(ctx, slog.LevelWarn, "smtp connection failed", d.Name, append(where, errorAttrs(d.Err)...)...)
				return
			}
			log(ctx, slog.LevelInfo, "smtp connection open", d.Name, append(where, slog.String("tls", tlsName(d.TLSVersion)),
				slog.Bool("resumed", d.Resumed), slog.Any("extensions", printable.Lines(d.Extensions)))...)
		},
		GotConn: func(ctx context.Context, g GotConnInfo) {
			log(ctx, slog.LevelDebug, "smtp connection taken", g.Name, slog.Int64("conn", g.Conn), slog.Int("messages", g.Messages),
				slog.Bool("overlapped", g.Overlapped), slog.Duration("waited", g.Waited))
		},
		Command: func(ctx context.Context, c CommandInfo) {
			log(ctx, slog.LevelDebug, "smtp command", c.Name, slog.Int64("conn", c.Conn), slog.String("line", printable.Line(c.Line)))
		},
		Reply: func(ctx context.Context, r ReplyInfo) {
			log(ctx, slog.LevelDebug, "smtp reply", r.Name, slog.Int64("conn", r.Conn), slog.String("step", string(r.Op)),
				slog.String("reply", r.Reply.String()))
		},
		Retry: func(ctx context.Context, r RetryInfo) {
			log(ctx, slog.LevelWarn, "smtp message is tried again", r.Name, append(errorAttrs(r.Err),
				slog.Int("attempt", r.Attempt), slog.Duration("wait", r.Wait))...)
		},
		SendDone: func(ctx context.Context, s SendDoneInfo) {
			about := []slog.Attr{slog.String("from", printable.Line(s.Message.From)), slog.Any("to", printable.Lines(s.Message.To)),
				slog.Duration("took", s.Took)}
			if s.Err != nil {
				log(ctx, slog.LevelWarn, "smtp message failed", s.Name, append(about, errorAttrs(s.Err)...)...)
				return
			}
			log(ctx, slog.LevelInfo, "smtp message accepted", s.Name, append(about, slog.String("queue_id", printable.Line(s.Receipt.QueueID)))...)
		},
		ConnClosed: func(ctx context.Context, c ConnClosedInfo) {
			attrs := []slog.Attr{slog.Int64("conn", c.Conn), slog.Int("messages", c.Messages), slog.String("reason", c.Reason)}
			if c.Err != nil {
				attrs = append(attrs, slog.String("err", oneLine(c.Err)))
			}
			log(ctx, slog.LevelInfo, "smtp connection closed", c.Name, attrs...)
		},
		Learned: func(ctx context.Context, i LearnedInfo) {
			level := slog.LevelInfo
			if i.Lesson == LessonBadCredentials {
				level = slog.LevelWarn
			}
			attrs := []slog.Attr{slog.String("lesson", string(i.Lesson)), slog.String("text", printable.Line(i.Text)), slog.String("addr", i.Addr)}
			if i.Reply.Code != 0 {
				attrs = append(attrs, slog.String("reply", i.Reply.String()))
			}
			log(ctx, level, "smtp relay learnt", i.Name, attrs...)
		},
	}
}

// errorAttrs is what LogTrace logs of an error.
func errorAttrs(err error) []slog.Attr {
	attrs := []slog.Attr{slog.String("err", oneLine(err))}
	if e, ok := err.(*Error); ok {
		attrs = append(attrs, e.attrs()...)
	}
	return attrs
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
	info := GotConnInfo{Name: p.cfg.Name, Addr: p.cfg.Addr, Conn: s.id, Messages: i.Used, Overlapped: i.Pending > 0, Waited: waited}
	t.GotConn(ctx, info)
}

func (p *pool) traceClosed(s *session, i conn.Info) {
	p.cfg.stats.countClose(i.Reason)
	t := p.cfg.Trace
	if t == nil || t.ConnClosed == nil {
		return
	}
	info := ConnClosedInfo{Name: p.cfg.Name, Addr: p.cfg.Addr, Conn: s.id, Messages: i.Used, Reason: string(i.Reason), Err: i.Err}
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
		trace.Command = func(ctx context.Context, line string) {
			t.Command(ctx, CommandInfo{Name: c.Name, Addr: c.Addr, Conn: id, Op: opOfCommand(line), Line: line})
		}
	}
	if t.Reply != nil {
		trace.Reply = func(ctx context.Context, to conn.Step, r wire.Reply) {
			t.Reply(ctx, ReplyInfo{Name: c.Name, Addr: c.Addr, Conn: id, Op: opOf(to), Reply: publicReply(r)})
		}
	}
	return trace
}

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

// Trace is a set of functions (hooks) that a Client calls when something happens, as in net/http/httptrace. Any may be nil. Use
// [LogTrace] for logs and [MultiTrace] for several Traces.
//
// Hooks are called from many goroutines at once. They must return quickly, since the event that they report waits for them, and
// must not call Shutdown or Close of their Client. No hook is given a secret. SendStart, SendDone and Retry are given the
// caller's own Message, with its Body; the other hooks see only the envelope of a message.
//
// The context given to a hook is the one that SendStart returned for the Send that the event belongs to. While a connection is opened
// it has the values of the Send that needed the connection first, and does not end with that Send. Without such a Send it is the
// background context.
type Trace struct {
	// SendStart is called when Send is called. The context that it returns is the context of the whole Send and is given to the other
	// hooks, so that a span begun here is the parent of theirs. Derive it from ctx. A nil result means ctx.
	SendStart func(ctx context.Context, info SendStartInfo) context.Context

	// SendDone is called just before Send returns, with its results.
	SendDone func(ctx context.Context, info SendDoneInfo)

	// DialStart is called before a connection is opened.
	DialStart func(ctx context.Context, info DialStartInfo)

	// DialDone is called when the connection is ready for its first message, or could not be opened.
	DialDone func(ctx context.Context, info DialDoneInfo)

	// GotConn is called when a Send or Ping has got a connection.
	GotConn func(ctx context.Context, info GotConnInfo)

	// Command is called when a command was written to the connection's buffer. The buffer may be sent later, with other commands.
	Command func(ctx context.Context, info CommandInfo)

	// Reply is called when a reply has arrived. It answers the oldest command without a reply.
	Reply func(ctx context.Context, info ReplyInfo)

	// Retry is called when an attempt has failed and the message will be retried. It is not called for connections that could
	// not be opened: see DialDone.
	Retry func(ctx context.Context, info RetryInfo)

	// ConnClosed is called when a connection is closed and no longer counts for Limits.MaxConns.
	ConnClosed func(ctx context.Context, info ConnClosedInfo)

	// Learned is called when the Client has learned something about its relay and acts on it from now on. Calls come one at a time
	// and in order. If the hook is 256 calls behind, further calls are dropped.
	Learned func(ctx context.Context, info LearnedInfo)
}

// SendStartInfo is given to [Trace].SendStart.
type SendStartInfo struct {
	Name    string // Config.Name
	Addr    string // Config.Addr
	Message Message
}

// SendDoneInfo is given to [Trace].SendDone.
type SendDoneInfo struct {
	Name    string // Config.Name
	Addr    string // Config.Addr
	Message Message
	Receipt Receipt
	Err     error         // nil or an *Error, as Send returns it
	Took    time.Duration // duration of the whole Send, including waits
}

// DialStartInfo is given to [Trace].DialStart.
type DialStartInfo struct {
	Name string // Config.Name
	Addr string // Config.Addr
	Conn int64  // the connection: the Client numbers its connections from 1
}

// DialDoneInfo is given to [Trace].DialDone.
type DialDoneInfo struct {
	Name       string   // Config.Name
	Addr       string   // Config.Addr
	Remote     string   // IP and port of the relay's address that was tried, if known
	Conn       int64    // as in DialStartInfo
	TLSVersion uint16   // a version of crypto/tls; 0 means no TLS
	Resumed    bool     // the TLS session was resumed
	Extensions []string // the keywords of the EHLO reply in force
	Took       time.Duration
	Err        error // nil if the connection is open, else an *Error
}

// GotConnInfo is given to [Trace].GotConn.
type GotConnInfo struct {
	Name       string        // Config.Name
	Addr       string        // Config.Addr
	Conn       int64         // as in DialStartInfo
	Messages   int           // transactions begun on the connection before this one
	Overlapped bool          // the previous transaction has no final reply yet
	Waited     time.Duration // how long the Send has waited for the connection
}

// CommandInfo is given to [Trace].Command.
type CommandInfo struct {
	Name string // Config.Name
	Addr string // Config.Addr
	Conn int64  // as in DialStartInfo
	Op   Op
	Line string // without CRLF; the arguments of AUTH are "[redacted]"; "." is the end of a message sent with DATA
}

// ReplyInfo is given to [Trace].Reply.
type ReplyInfo struct {
	Name  string // Config.Name
	Addr  string // Config.Addr
	Conn  int64  // as in DialStartInfo
	Op    Op     // the command that it answers; empty for a reply without a command
	Reply Reply
}

// RetryInfo is given to [Trace].Retry.
type RetryInfo struct {
	Name    string // Config.Name
	Addr    string // Config.Addr
	Message Message
	Err     error // why the attempt failed, an *Error

	// Attempt is the number of failed attempts so far that count for Retry.MaxAttempts. If only the connection was at fault, the
	// message goes to another connection at once: Attempt does not grow and Wait is 0.
	Attempt int
	Wait    time.Duration // before the next attempt
}

// ConnClosedInfo is given to [Trace].ConnClosed.
type ConnClosedInfo struct {
	Name     string // Config.Name
	Addr     string // Config.Addr
	Conn     int64  // as in DialStartInfo
	Messages int    // transactions begun on the connection
	Reason   string // "full" (Limits.MaxMessagesPerConn), "age", "idle", "shared" (another process waits for its place in Limits.Slots), "closed" (Shutdown, Close) or "fault"
	Err      error  // what went wrong; nil unless Reason is "fault"
}

// LearnedInfo is given to [Trace].Learned.
type LearnedInfo struct {
	Name   string // Config.Name
	Addr   string // Config.Addr
	Lesson Lesson
	Limit  int    // the new limit, for a lesson that is one; 0 means that the limit is gone
	Text   string // the lesson in words, for people
	Reply  Reply  // the reply from which the Client learned it; Code 0 if there was no single reply
}

// Lesson is the kind of a LearnedInfo, as a short word for the label of a metric.
type Lesson string

const (
	LessonNoOverlap      Lesson = "no_overlap"      // the next message is written only after the reply to the previous one
	LessonNoRset         Lesson = "no_rset"         // EHLO is sent in place of RSET
	LessonPace           Lesson = "pace"            // messages are sent at a limited rate; Limit is messages per second, at least 1
	LessonAddress        Lesson = "address"         // an address of the relay is tried last for a while: it failed
	LessonAuthAlone      Lesson = "auth_alone"      // AUTH is sent alone, not together with the commands of the first message
	LessonMaxMessages    Lesson = "max_messages"    // Limit is messages per connection
	LessonMaxRecipients  Lesson = "max_recipients"  // Limit is recipients per transaction
	LessonMaxConns       Lesson = "max_conns"       // Limit is open connections, for a while
	LessonBadCredentials Lesson = "bad_credentials" // the relay refused the credentials: no connection is opened for a while
	LessonChunks         Lesson = "chunks"          // one address of the relay passed the test for Config.Chunking
	LessonNoChunks       Lesson = "no_chunks"       // one address of the relay failed the test: it gets bodies with DATA
)

// MultiTrace returns a Trace that calls the hooks of all traces, in their order. nil traces are skipped. Each SendStart is given
// the context that the previous SendStart has returned.
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

// startSend calls hook and returns the context of the Send: the hook's result, or ctx if that is nil.
func startSend(ctx context.Context, hook func(context.Context, SendStartInfo) context.Context, info SendStartInfo) context.Context {
	if started := hook(ctx, info); started != nil {
		return started
	}
	return ctx
}

// LogTrace returns a Trace that logs to l: failures at level Warn; messages, connections and lessons at Info; commands and replies at
// Debug. An error is logged as its text ("err") with the attributes "step", "outcome", "scope", "code" and "attempts". Config.Name, if
// set, is the attribute "relay". Envelope addresses are logged; secrets and bodies are not. Text from a relay or a user is logged on one
// line of printable characters.
func LogTrace(l *slog.Logger) *Trace {
	log := func(ctx context.Context, level slog.Level, msg, name string, attrs ...slog.Attr) {
		if name != "" {
			attrs = append(attrs, slog.String("relay", printable.Line(name)))
		}
		l.LogAttrs(ctx, level, msg, attrs...)
	}
	return &Trace{
		DialDone: func(ctx context.Context, d DialDoneInfo) {
			where := []slog.Attr{slog.Int64("conn", d.Conn), slog.String("addr", d.Addr), slog.String("remote", d.Remote), slog.Duration("took", d.Took)}
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

// errorAttrs returns the attributes that LogTrace logs for an error.
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

// connTrace returns the trace of connection id, which calls the hooks of c.Trace.
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

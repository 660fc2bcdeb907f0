// Package natslog is what natsstore and natsslots have in common: a stream of JetStream that many processes write and all
// read in one order, and who of them is there.
//
// A subject holds its last message only. Every change is a compare-and-set: it names the sequence of the message that it
// replaces. What a process wrote before it was paused, or what a connection held back and sent late, replaces nothing that
// came in between.
package natslog

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var (
	// ErrConflict is returned where a subject's last message is not the one that was to be replaced.
	ErrConflict = errors.New("another process was first")
	// ErrNotFound is returned where a subject has no message.
	ErrNotFound = errors.New("not found")
)

// Options are those of a connection that notices within seconds that its server is gone, and returns for as long as it takes.
// Nothing is kept back to be sent later.
func Options() []nats.Option {
	return []nats.Option{
		nats.PingInterval(time.Second), nats.MaxPingsOutstanding(2), nats.Timeout(2 * time.Second),
		nats.MaxReconnects(-1), nats.ReconnectWait(100 * time.Millisecond), nats.ReconnectBufSize(-1), nats.RetryOnFailedConnect(true),
	}
}

// Log is a stream.
type Log struct {
	js   jetstream.JetStream
	name string
}

// Message is a message of a Log.
type Message struct {
	Subject string // without the name of the log
	Seq     uint64
	Time    time.Time // by the server's clock
	Header  nats.Header
	Data    []byte
	Pending uint64 // of Scan: how many follow
}

var names = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// Existing, in the place of a number of replicas, is for a log that is not to be created.
const Existing = 0

// Open opens the log of that name. It is created if it is not there, with so many replicas, unless that is Existing.
func Open(ctx context.Context, js jetstream.JetStream, name string, replicas int) (*Log, error) {
	if !names.MatchString(name) {
		return nil, fmt.Errorf("the name %q: want letters, digits, - and _", name)
	}
	l := &Log{js: js, name: name}
	want := jetstream.StreamConfig{Name: name, Subjects: []string{name + ".>"}, Storage: jetstream.FileStorage, Replicas: replicas,
		MaxMsgsPerSubject: 1, AllowMsgTTL: true, AllowDirect: true}
	for {
		try, cancel := context.WithTimeout(ctx, tryTime)
		stream, err := js.Stream(try, name)
		if errors.Is(err, jetstream.ErrStreamNotFound) && replicas != Existing {
			stream, err = js.CreateStream(try, want)
		}
		cancel()
		if err == nil {
			if c := stream.CachedInfo().Config; c.MaxMsgsPerSubject != 1 || !c.AllowMsgTTL || !c.AllowDirect || c.Storage != jetstream.FileStorage {
				return nil, fmt.Errorf("the stream %q is there and is none of ours: it wants one message for each subject, files, TTLs, and direct reads", name)
			}
			return l, nil
		}
		if final(err) && !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			return nil, err
		}
		if pause(ctx) != nil {
			return nil, err
		}
	}
}

const (
	tryTime   = 2 * time.Second // for an answer; a leader that dies gives none
	tryPause  = 50 * time.Millisecond
	noCluster = 10074   // the server's code for several replicas where it is alone
	writeName = "Write" // the header that tells our own write from another's
)

func pause(ctx context.Context) error {
	timer := time.NewTimer(tryPause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// final reports whether the same request would get the same answer.
func final(err error) bool {
	if errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrPermissionViolation) || errors.Is(err, nats.ErrAuthorization) {
		return true
	}
	e, ok := errors.AsType[*jetstream.APIError](err)
	return ok && (e.Code < 500 && e.Code != 408 && e.Code != 429 || e.ErrorCode == noCluster)
}

func conflict(err error) bool {
	e, ok := errors.AsType[*jetstream.APIError](err)
	return ok && (e.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || e.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

// Write replaces the message of subject whose sequence is expect; 0: there is none. It tries until ctx ends. Any error but ErrConflict
// may mean that the message was written, or will be: for as long as nobody else has written.
func (l *Log) Write(ctx context.Context, subject string, expect uint64, header nats.Header, data []byte, opts ...jetstream.PublishOpt) (seq uint64, err error) {
	return l.write(ctx, rand.Text(), subject, subject, expect, header, data, opts...)
}

// WriteAmong writes a message of subject if the last one of all subjects that match among, of which subject is one, has the sequence expect; 0:
// there is none. It is like Write otherwise. Whoever writes one of these subjects names the same pattern.
func (l *Log) WriteAmong(ctx context.Context, among, subject string, expect uint64, header nats.Header, data []byte) (seq uint64, err error) {
	return l.write(ctx, rand.Text(), among, subject, expect, header, data)
}

func (l *Log) write(ctx context.Context, name, among, subject string, expect uint64, header nats.Header, data []byte, opts ...jetstream.PublishOpt) (seq uint64, err error) {
	if header == nil {
		header = nats.Header{}
	}
	header.Set(writeName, name)
	opts = append(opts, jetstream.WithExpectLastSequenceForSubject(expect, l.name+"."+among), jetstream.WithRetryAttempts(0))
	for {
		try, cancel := context.WithTimeout(ctx, tryTime)
		ack, err := l.js.PublishMsg(try, &nats.Msg{Subject: l.name + "." + subject, Header: header, Data: data}, opts...)
		cancel()
		if err == nil {
			return ack.Sequence, nil
		}
		if conflict(err) {
			// By an earlier try of ours, whose answer was lost? Or by one that is under way, and may fail?
			last, lastErr := l.Last(ctx, among)
			switch {
			case lastErr == nil && last.Header.Get(writeName) == name:
				return last.Seq, nil
			case lastErr == nil && last.Seq != expect, errors.Is(lastErr, ErrNotFound) && expect != 0:
				return 0, ErrConflict
			}
		} else if final(err) {
			return 0, err
		}
		if pause(ctx) != nil {
			return 0, err
		}
	}
}

// Last returns the message of subject, or the last one of those that match it, from the stream's leader.
func (l *Log) Last(ctx context.Context, subject string) (*Message, error) {
	request, err := json.Marshal(map[string]string{"last_by_subj": l.name + "." + subject})
	if err != nil {
		return nil, err
	}
	for {
		m, err := l.last(ctx, request)
		if err == nil || errors.Is(err, ErrNotFound) || final(err) {
			return m, err
		}
		if pause(ctx) != nil {
			return nil, err
		}
	}
}

// api is the subject of a request about the stream.
func (l *Log) api(request string) string {
	prefix := "$JS.API."
	switch o := l.js.Options(); {
	case o.APIPrefix != "":
		prefix = strings.TrimSuffix(o.APIPrefix, ".") + "."
	case o.Domain != "":
		prefix = "$JS." + o.Domain + ".API."
	}
	return prefix + request + "." + l.name
}

// ask asks the stream's leader, once.
func (l *Log) ask(ctx context.Context, request string, data []byte) (got answer, err error) {
	try, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	m, err := l.js.Conn().RequestWithContext(try, l.api(request), data)
	if err == nil {
		err = json.Unmarshal(m.Data, &got)
	}
	if err == nil && got.Error != nil {
		err = got.Error
	}
	return got, err
}

// answer is a server's.
type answer struct {
	Error   *jetstream.APIError
	Message struct {
		Subject string
		Seq     uint64
		Hdrs    []byte
		Data    []byte
		Time    time.Time
	}
}

func (l *Log) last(ctx context.Context, request []byte) (*Message, error) {
	got, err := l.ask(ctx, "STREAM.MSG.GET", request)
	if err != nil {
		if got.Error != nil && got.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound {
			err = ErrNotFound
		}
		return nil, err
	}
	m := &Message{Subject: strings.TrimPrefix(got.Message.Subject, l.name+"."), Seq: got.Message.Seq, Time: got.Message.Time, Data: got.Message.Data}
	if len(got.Message.Hdrs) > 0 {
		if m.Header, err = nats.DecodeHeadersMsg(got.Message.Hdrs); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// most is how many messages a server gives at once.
const most = 1000

// Some calls f with the messages of many subjects, in one request for all of them, as one of the servers has them: it may be behind the leader, and
// what it does not have, or cannot give at once, is left out.
func (l *Log) Some(ctx context.Context, subjects []string, f func(Message)) {
	for some := range slices.Chunk(subjects, most) {
		l.some(ctx, some, f)
	}
}

func (l *Log) some(ctx context.Context, subjects []string, f func(Message)) {
	full := make([]string, len(subjects))
	for i, s := range subjects {
		full[i] = l.name + "." + s
	}
	request, err := json.Marshal(map[string]any{"multi_last": full})
	if err != nil {
		return
	}
	nc := l.js.Conn()
	inbox := nc.NewInbox()
	answers, err := nc.SubscribeSync(inbox)
	if err != nil {
		return
	}
	defer func() { _ = answers.Unsubscribe() }()
	if nc.PublishRequest(l.api("DIRECT.GET"), inbox, request) != nil {
		return
	}
	try, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	for {
		m, err := answers.NextMsgWithContext(try)
		if err != nil || m.Header.Get("Status") != "" { // the end, or an error
			return
		}
		seq, err := strconv.ParseUint(m.Header.Get(jetstream.SequenceHeader), 10, 64)
		if err != nil {
			return
		}
		f(Message{Subject: strings.TrimPrefix(m.Header.Get(jetstream.SubjectHeader), l.name+"."), Seq: seq, Header: m.Header, Data: m.Data})
	}
}

// RemoveAll removes the messages whose subject begins with those tokens. It tries until ctx ends.
func (l *Log) RemoveAll(ctx context.Context, tokens string) error {
	return l.purge(ctx, map[string]any{"filter": l.name + "." + tokens + ".>"})
}

// RemoveUpTo removes the messages of the subjects that match among whose sequence is seq or less. It tries until ctx ends.
func (l *Log) RemoveUpTo(ctx context.Context, among string, seq uint64) error {
	return l.purge(ctx, map[string]any{"filter": l.name + "." + among, "seq": seq + 1})
}

func (l *Log) purge(ctx context.Context, which map[string]any) error {
	request, err := json.Marshal(which)
	if err != nil {
		return err
	}
	for {
		_, err := l.ask(ctx, "STREAM.PURGE", request)
		if err == nil || final(err) {
			return err
		}
		if pause(ctx) != nil {
			return err
		}
	}
}

// Mark writes a message that means nothing, and returns its sequence: who follows and has come so far has seen all that was
// written before.
func (l *Log) Mark(ctx context.Context) (seq uint64, err error) {
	for {
		try, cancel := context.WithTimeout(ctx, tryTime)
		ack, err := l.js.Publish(try, l.name+".now", nil)
		cancel()
		if err == nil {
			return ack.Sequence, nil
		}
		if final(err) || pause(ctx) != nil {
			return 0, err
		}
	}
}

// silence is how long Follow hears nothing from the server before it asks anew.
const silence = 4 * time.Second

// Follow calls f with each message, in order, without its data, until ctx ends. What was replaced or removed before it came
// so far is left out.
func (l *Log) Follow(ctx context.Context, f func(Message)) {
	next := uint64(1)
	for ctx.Err() == nil {
		l.follow(ctx, &next, f)
		_ = pause(ctx)
	}
}

// consumer makes a consumer that lives for a few seconds after it was used last.
func (l *Log) consumer(ctx context.Context, from uint64, filter string, headersOnly bool) (jetstream.Consumer, error) {
	try, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	return l.js.CreateConsumer(try, l.name, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: from, AckPolicy: jetstream.AckNonePolicy, FilterSubject: filter,
		HeadersOnly: headersOnly, InactiveThreshold: 10 * time.Second, MemoryStorage: true, Replicas: 1,
	})
}

// follow follows from *next on until something is missing.
func (l *Log) follow(ctx context.Context, next *uint64, f func(Message)) {
	c, err := l.consumer(ctx, *next, "", true)
	if err != nil {
		return
	}
	messages, err := c.Messages(jetstream.PullExpiry(3*silence), jetstream.PullHeartbeat(silence/2), jetstream.PullMaxMessages(1000),
		jetstream.WithMessagesErrOnMissingHeartbeat(true))
	if err != nil {
		return
	}
	defer messages.Stop()
	for seen := uint64(1); ; seen++ {
		m, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return
		}
		got, number, err := l.message(m)
		if err != nil || number != seen { // some were lost on the way
			return
		}
		*next = got.Seq + 1
		f(got)
	}
}

func (l *Log) message(m jetstream.Msg) (got Message, number uint64, err error) {
	meta, err := m.Metadata()
	if err != nil {
		return Message{}, 0, err
	}
	return Message{Subject: strings.TrimPrefix(m.Subject(), l.name+"."), Seq: meta.Sequence.Stream, Time: meta.Timestamp, Header: m.Headers(), Data: m.Data(),
		Pending: meta.NumPending}, meta.Sequence.Consumer, nil
}

// Scan calls f with the messages whose subject begins with that token, in order, until there are no more or f returns false.
func (l *Log) Scan(ctx context.Context, token string, headersOnly bool, f func(Message) bool) error {
	c, err := l.consumer(ctx, 1, l.name+"."+token+".>", headersOnly)
	if err != nil {
		return err
	}
	if c.CachedInfo().NumPending == 0 {
		return nil
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		batch, err := c.Fetch(100, jetstream.FetchMaxWait(tryTime))
		if err != nil {
			return err
		}
		any := false
		for m := range batch.Messages() {
			got, _, err := l.message(m)
			if err != nil {
				return err
			}
			if any = true; !f(got) || got.Pending == 0 {
				return nil
			}
		}
		if err := batch.Error(); err != nil {
			return err
		}
		if !any {
			return fmt.Errorf("the server has not answered for %v", tryTime)
		}
	}
}

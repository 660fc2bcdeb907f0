package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/smtprelay/smtprelay"
)

// A journal knows what became of each message, so that a run that was killed can be followed by another one that sends nothing
// twice. It is a file of JSON, one record a line, that only grows. Of a message there is
//
//   - an intent, on the disk before the end of the message can leave: from then on the relay may have it;
//   - a result, once it is known.
//
// An intent without a result is a message whose outcome is unknown. A result that was lost with the machine leaves its intent: nothing is
// sent twice, and one more message is unknown.
type journal struct {
	f     *os.File // nil: nothing is kept
	known map[string]map[string]fate

	mu      sync.Mutex // guards the fields below and the order of writes
	written int64      // records
	err     error      // the first of a write; no further message is sent

	syncing sync.Mutex // held over Sync: those who wait for it share the next one; guards synced
	synced  int64      // records that are on the disk
}

// A fate is what became of a message for one recipient.
type fate string

const (
	fateAccepted fate = "accepted"
	fateRefused  fate = "refused" // for good
	fateUnknown  fate = "unknown" // the relay may have it
	fateLeft     fate = "left"    // nobody has it: to be sent again
)

// A record is a line of the journal.
type record struct {
	Mail    string          `json:"mail"`             // the key
	Source  string          `json:"source,omitempty"` // for people
	Intent  []string        `json:"intent,omitempty"` // recipients to whom it may be sent from now on
	Result  map[string]fate `json:"result,omitempty"`
	QueueID string          `json:"queue_id,omitempty"`
	Error   string          `json:"error,omitempty"`
}

// openJournal reads the journal of that path, which need not exist, and holds it until it is closed. "" keeps nothing.
func openJournal(path string) (*journal, error) {
	j := &journal{known: map[string]map[string]fate{}}
	if path == "" {
		return j, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) // it has addresses
	if err != nil {
		return nil, err
	}
	if err := lock(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s is in use by another run: %w", path, err)
	}
	j.f = f
	if err := j.load(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return j, nil
}

// load reads what there is. A last line without its end was being written when the run was killed, and is cut off: if it was an
// intent, the end of its message has not left.
func (j *journal) load() error {
	r := bufio.NewReader(j.f)
	var whole int64
	for n := 1; ; n++ {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		var rec record
		if err := json.Unmarshal(line, &rec); err != nil || rec.Mail == "" {
			return fmt.Errorf("line %d is no record of a journal", n)
		}
		j.apply(&rec)
		whole += int64(len(line))
	}
	if err := j.f.Truncate(whole); err != nil {
		return err
	}
	_, err := j.f.Seek(whole, io.SeekStart)
	return err
}

func (j *journal) apply(rec *record) {
	fates := j.known[rec.Mail]
	if fates == nil {
		fates = map[string]fate{}
		j.known[rec.Mail] = fates
	}
	for _, to := range rec.Intent {
		fates[to] = fateUnknown
	}
	for to, is := range rec.Result {
		fates[to] = is
	}
}

// fates is what became of a message in the runs before: nil if nothing is known.
func (j *journal) fates(m *mail) map[string]fate { return j.known[m.key] }

// intent notes that the message may be with the relay from now on, and returns when that is on the disk.
func (j *journal) intent(m *mail, to []string) error {
	if j.f == nil {
		return nil
	}
	n, err := j.write(&record{Mail: m.key, Source: m.source, Intent: to})
	if err != nil {
		return err
	}
	j.syncing.Lock()
	defer j.syncing.Unlock()
	if j.synced >= n {
		return nil // by somebody who came later
	}
	j.mu.Lock()
	n = j.written
	j.mu.Unlock()
	if err := j.f.Sync(); err != nil {
		return fmt.Errorf("the journal cannot be written: %w", err)
	}
	j.synced = n
	return nil
}

// result notes what became of the message. It need not be on the disk: see journal.
func (j *journal) result(m *mail, result map[string]fate, r smtprelay.Result) error {
	if j.f == nil {
		return nil
	}
	rec := &record{Mail: m.key, Result: result, QueueID: r.Receipt.QueueID}
	if r.Err != nil {
		rec.Error = r.Err.Error()
	}
	_, err := j.write(rec)
	return err
}

func (j *journal) write(rec *record) (int64, error) {
	var line bytes.Buffer
	enc := json.NewEncoder(&line)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(rec); err != nil {
		return 0, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err == nil {
		if _, err := j.f.Write(line.Bytes()); err != nil {
			j.err = fmt.Errorf("the journal cannot be written: %w", err)
		}
		j.written++
	}
	return j.written, j.err
}

// close lets go of the journal. What was written is on the disk then.
func (j *journal) close() error {
	if j.f == nil {
		return nil
	}
	return errors.Join(j.err, j.f.Sync(), j.f.Close())
}
